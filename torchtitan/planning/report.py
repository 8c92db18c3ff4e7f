"""A plan as tables for the terminal, and as JSON."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from torchtitan.tools.text import duration, human, three_digits

from .estimate import Plan, RankPlan

CATEGORIES = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer_state": "optimizer",
    "whole_parameters": "whole parameters",
    "whole_gradients": "whole gradients",
    "activations": "activations",
    "pipeline_buffers": "pipeline buffers",
    "temporary": "temporary",
}
"""Field of `Memory` -> heading."""
_GIB = 2**30


@dataclass(frozen=True)
class Budget:
    """What a number of tokens costs."""

    tokens: float
    steps: int
    seconds: float
    device_hours: float
    cost: float | None
    """At a price of a device and hour."""

    @classmethod
    def of(cls, plan: Plan, tokens: float, price: float | None) -> Budget:
        steps = math.ceil(tokens / (plan.tokens_per_step * plan.replica_groups))
        seconds = steps * plan.step_seconds
        hours = seconds * plan.world_size * plan.replica_groups / 3600
        return cls(tokens, steps, seconds, hours, None if price is None else hours * price)


def show(plan: Plan, budget: Budget | None = None) -> None:
    """Print to stdout."""
    # A pipe has no width of its own; in a log, cut columns would be worse than long lines.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(headline(plan), soft_wrap=True)
    console.print(_table("memory of a rank at its peak, GiB", *memory_rows(plan)))
    console.print(_table("what a rank sends in a step", *traffic_rows(plan), left=4))
    for line in summary(plan, budget):
        console.print(line, soft_wrap=True)


def headline(plan: Plan) -> str:
    model, device = plan.config.model, plan.device
    of_groups = f" of each of {plan.replica_groups} replica groups" * (plan.replica_groups > 1)
    return (
        f"{model.name} {model.flavor}: {human(plan.nparams)} parameters on {plan.world_size:,} "
        f"{device.name}{of_groups} ({plan.dims})"
    )


def memory_rows(plan: Plan) -> tuple[list[str], list[list[str]]]:
    """Heading and cells: one row for pipeline ranks that need the same."""
    used = [
        name for name in CATEGORIES if any(getattr(r.memory, name) >= 2**20 for r in plan.ranks)
    ]
    pipeline = len(plan.ranks) > 1
    header = ["pipeline rank", "stages"] if pipeline else []
    header += [*(CATEGORIES[name] for name in used), "peak", "of the device's", "verdict"]
    rows = []
    for ranks in _alike(plan.ranks):
        rank = ranks[0]
        cells = [_run_of([r.pp_rank for r in ranks]), _stages(ranks)] if pipeline else []
        cells += [f"{getattr(rank.memory, name) / _GIB:.2f}" for name in used]
        cells += [f"{rank.peak / _GIB:.2f}", f"{plan.available / _GIB:.2f}", _verdict(plan, rank)]
        rows.append(cells)
    return header, rows


def traffic_rows(plan: Plan) -> tuple[list[str], list[list[str]]]:
    """What the pipeline rank that sends for the longest time sends, as a table."""
    header = ["collective", "group", "ranks", "link", "calls", "GB", "seconds"]
    rank = max(plan.ranks, key=lambda r: sum(t.seconds for t in r.traffic))
    rows = [
        [
            t.kind,
            t.group,
            f"{t.ranks:,}",
            t.link,
            f"{t.calls:,.0f}",
            three_digits(t.sent / 1e9),
            three_digits(t.seconds),
        ]
        for t in sorted(rank.traffic, key=lambda t: -t.seconds)
    ]
    return header, rows


def summary(plan: Plan, budget: Budget | None) -> list[str]:
    rank = plan.busiest
    parts = {
        "matrix products": rank.compute_seconds,
        "other operations": rank.other_seconds,
        "waiting for collectives": rank.waiting_seconds,
    }
    lines = [
        f"step: {three_digits(plan.step_seconds)} s for {plan.tokens_per_step:,} tokens"
        + " of a group" * (plan.replica_groups > 1)
        + ": "
        + ", ".join(f"{name} {three_digits(seconds)} s" for name, seconds in parts.items())
    ]
    if plan.timeline:
        lines.append(f"pipeline bubble: {100 * plan.bubble:.1f}% of the time")
    devices = plan.world_size * plan.replica_groups
    lines += [
        f"tokens/s: {plan.tokens_per_second:,.0f} of a device, "
        f"{plan.tokens_per_second * devices:,.0f} in all; MFU {100 * plan.mfu:.1f}%; "
        f"bound by {plan.bound}",
    ]
    if plan.room >= 0:
        lines.append(f"it fits, with {plan.room / _GIB:.1f} GiB left on the fullest rank")
    else:
        lines.append(f"it does NOT fit: {-plan.room / _GIB:.1f} GiB too much on the fullest rank")
    if budget:
        cost = "" if budget.cost is None else f", {budget.cost:,.0f} at that price"
        lines.append(
            f"{human(budget.tokens)} tokens: {budget.steps:,} steps, {duration(budget.seconds)}, "
            f"{budget.device_hours:,.0f} device hours{cost}"
        )
    return lines


def as_json(plan: Plan, budget: Budget | None = None) -> dict[str, Any]:
    """Bytes, seconds and shares, unrounded."""
    model = plan.config.model
    return {
        "model": {"name": model.name, "flavor": model.flavor, "parameters": plan.nparams},
        "device": asdict(plan.device),
        "world_size": plan.world_size,
        "replica_groups": plan.replica_groups,
        "layout": str(plan.dims),
        "fits": plan.room >= 0,
        "room_bytes": plan.room,
        "peak_bytes": plan.peak,
        "step_seconds": plan.step_seconds,
        "tokens_per_step": plan.tokens_per_step,
        "tokens_per_second_per_device": plan.tokens_per_second,
        "mfu": plan.mfu,
        "bubble": plan.bubble,
        "bound": plan.bound,
        "ranks": [asdict(rank) | {"peak": rank.peak} for rank in plan.ranks],
        "budget": asdict(budget) if budget else None,
    }


def _alike(ranks: list[RankPlan]) -> list[list[RankPlan]]:
    """Neighbours that need the same memory, together."""
    groups: list[list[RankPlan]] = []
    for rank in ranks:
        if groups and groups[-1][0].memory == rank.memory:
            groups[-1].append(rank)
        else:
            groups.append([rank])
    return groups


def _run_of(numbers: list[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _stages(ranks: list[RankPlan]) -> str:
    if len(ranks) == 1 or len(ranks[0].stages) > 1:
        return ", ".join(str(stage) for rank in ranks for stage in rank.stages)
    return _run_of([rank.stages[0] for rank in ranks])


def _verdict(plan: Plan, rank: RankPlan) -> str:
    room = (plan.available - rank.peak) / _GIB
    return f"fits, {room:.1f} left" if room >= 0 else f"{-room:.1f} too much"


def _table(title: str, header: list[str], rows: list[list[str]], left: int = 0) -> Table:
    """`left`: columns that hold words."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for column, heading in enumerate(header):
        table.add_column(heading, justify="left" if column < left else "right")
    for row in rows:
        table.add_row(*row, style="red" if row[-1].endswith("too much") else "")
    return table
