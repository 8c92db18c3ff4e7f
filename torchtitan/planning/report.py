"""Formats a plan, or the result of a search, as tables for the terminal; a plan also as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from torchtitan.tools.tables import console, rich_table
from torchtitan.tools.text import duration, human, ranges, three_digits

from .devices import GIB
from .plan import Plan, RankPlan
from .search import Found

CATEGORIES = {
    "parameters": ("parameters", "#4269d0"),
    "gradients": ("gradients", "#efb118"),
    "optimizer_state": ("optimizer", "#ff725c"),
    "whole_parameters": ("whole parameters", "#6cc5b0"),
    "whole_gradients": ("whole gradients", "#3ca951"),
    "activations": ("activations", "#ff8ab7"),
    "pipeline_buffers": ("pipeline buffers", "#a463f2"),
    "temporary": ("temporary", "#9c9c9c"),
}
"""Field of `Memory` -> its name, and its colour in drawings."""
_SEARCH_HEADER = ["layout", "checkpointing", "micro-batch", "schedule", "step s", "tokens/s"]
_SEARCH_HEADER += ["MFU", "peak GiB", ""]
_SHOWN = 12
_WIDTH = 200
"""Width in a log."""


@dataclass(frozen=True)
class Budget:
    """Cost of a number of tokens."""

    tokens: float
    steps: int
    seconds: float
    device_hours: float
    cost: float | None
    """At a price for one device and hour."""

    @classmethod
    def of(cls, plan: Plan, tokens: float, price: float | None) -> Budget:
        sizes = plan.batch_sizes
        steps, seconds, left = 0, 0.0, tokens / plan.config.training.seq_len
        for size, last in sizes.stages:
            more = max(min(math.ceil(left / size), last - steps), 0)
            fewer_passes = (sizes.largest - size) // sizes.one_pass
            seconds += more * (plan.step_seconds - fewer_passes * plan.pass_seconds)
            steps, left = steps + more, left - more * size
        hours = seconds * plan.world_size * plan.replica_groups / 3600
        return cls(tokens, steps, seconds, hours, None if price is None else hours * price)


def show(plan: Plan, budget: Budget | None = None) -> None:
    """Print a plan to stdout."""
    out = console(_WIDTH)
    out.print(headline(plan), soft_wrap=True)
    out.print(memory_table(plan, out))
    out.print(rich_table(*traffic_rows(plan), range(4), title=traffic_title(plan)))
    for line in summary(plan, budget):
        out.print(line, soft_wrap=True)


def show_found(found: Found) -> None:
    """Print the result of a search to stdout."""
    out = console(_WIDTH)
    out.print(
        f"{found.considered:,} layouts considered, {len(found.traced)} traced, "
        f"{len(found.fitting)} of them fit"
        + ("" if found.finished else "; stopped by --seconds, a longer search may find better")
        + "; no layout fits, by arithmetic; this is the smallest" * found.hopeless,
        soft_wrap=True,
    )
    out.print(rich_table(_SEARCH_HEADER, search_rows(found), (0, 1, 2, 3, 8)))


def headline(plan: Plan) -> str:
    model, device = plan.config.model, plan.device
    of_groups = f" of each of {plan.replica_groups} replica groups" * (plan.replica_groups > 1)
    where = f"{plan.world_size:,} {device.name}{of_groups} ({plan.dims})"
    return f"{model}: {human(plan.nparams)} parameters on {where}"


def memory_table(plan: Plan, out: Console) -> Table:
    """Return a row for each kind of rank, or a column if `out` is too narrow for that."""
    header, rows = memory_rows(plan)
    title = "memory of a rank at its peak, GiB"
    table = rich_table(header, rows, (), title=title, style=_style_of_fit)
    unlimited = out.options.update(max_width=1000)
    if out.measure(table, options=unlimited).maximum <= out.width:
        return table
    turned = [list(cells) for cells in zip(header, *rows, strict=True)]
    head = turned.pop(0) if len(plan.ranks) > 1 else ["", ""]
    return rich_table(head, turned, (0,), title=title, style=_style_of_fit)


def memory_rows(plan: Plan) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows: one row for neighbouring pipeline ranks with equal needs."""
    used = [
        name for name in CATEGORIES if any(getattr(r.memory, name) >= 2**20 for r in plan.ranks)
    ]
    pipeline = len(plan.ranks) > 1
    header = ["pipeline rank", "stages"] if pipeline else []
    header += [*(CATEGORIES[name][0] for name in used), "peak", "of the device's", "verdict"]
    rows = []
    for ranks in _alike(plan.ranks):
        rank = ranks[0]
        cells = []
        if pipeline:
            stages = [stage for r in ranks for stage in r.stages]
            cells = [ranges(r.pp_rank for r in ranks), ranges(stages)]
        cells += [f"{getattr(rank.memory, name) / GIB:.2f}" for name in used]
        cells += [f"{rank.peak / GIB:.2f}", f"{plan.available / GIB:.2f}", _verdict(plan, rank)]
        rows.append(cells)
    return header, rows


def traffic_title(plan: Plan) -> str:
    place = f" (pipeline rank {_loudest(plan).pp_rank})" * (len(plan.ranks) > 1)
    return f"what a rank sends in a step{place}"


def _loudest(plan: Plan) -> RankPlan:
    """Return the rank that sends for the longest time."""
    return max(plan.ranks, key=lambda r: sum(t.seconds for t in r.traffic))


def traffic_rows(plan: Plan) -> tuple[list[str], list[list[str]]]:
    """Return as a table the communication of the pipeline rank that sends for the longest time."""
    header = ["collective", "group", "ranks", "link", "calls", "GB", "seconds"]
    rank = _loudest(plan)
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


def search_rows(found: Found) -> list[list[str]]:
    """Return the fastest layouts that fit and the Pareto front; if none fits, the smallest."""
    front = {id(plan) for _, plan in found.pareto}
    shown = [
        pair for i, pair in enumerate(found.fitting) if i < _SHOWN or id(pair[1]) in front
    ] or sorted(found.traced, key=lambda pair: pair[1].peak)[:1]
    return [
        [
            str(candidate),
            candidate.ac,
            str(candidate.micro_batch),
            candidate.schedule,
            three_digits(plan.step_seconds),
            f"{plan.tokens_per_second:,.0f}",
            f"{100 * plan.mfu:.1f}%",
            f"{plan.peak / GIB:.1f}",
            "Pareto" if id(plan) in front else "" if plan.room >= 0 else "does not fit",
        ]
        for candidate, plan in shown
    ]


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
        + (f"; pipeline rank {rank.pp_rank}: " if plan.timeline else ": ")
        + ", ".join(f"{name} {three_digits(seconds)} s" for name, seconds in parts.items())
    ]
    if plan.timeline:
        lines.append(f"pipeline bubble: {100 * plan.bubble:.1f}% of the time")
    devices = plan.world_size * plan.replica_groups
    lines += [
        f"tokens/s: {plan.tokens_per_second:,.0f} per device, "
        f"{plan.tokens_per_second * devices:,.0f} in all; MFU {100 * plan.mfu:.1f}%; bound by "
        f"{plan.bound}",
    ]
    if plan.config.training.batch_size_ramp:
        lines.append(f"sequences of a step: {plan.batch_sizes}; the step above is of the largest")
    if plan.room >= 0:
        lines.append(f"it fits, with {plan.room / GIB:.1f} GiB left on the fullest rank")
    else:
        lines.append(f"it does NOT fit: {-plan.room / GIB:.1f} GiB too much on the fullest rank")
    if budget:
        cost = "" if budget.cost is None else f", {budget.cost:,.0f} at that price"
        lines.append(
            f"{human(budget.tokens)} tokens: {budget.steps:,} steps, {duration(budget.seconds)}, "
            f"{budget.device_hours:,.0f} device hours{cost}"
        )
    return lines


def as_json(plan: Plan, budget: Budget | None) -> dict[str, Any]:
    """Return bytes, seconds and shares, unrounded."""
    model = plan.config.model
    named = {"name": model.name, "flavor": model.flavor, "args": model.args}
    return {
        "model": named | {"parameters": plan.nparams},
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
    """Group neighbours that need the same memory."""
    groups: list[list[RankPlan]] = []
    for rank in ranks:
        if groups and groups[-1][0].memory == rank.memory:
            groups[-1].append(rank)
        else:
            groups.append([rank])
    return groups


def _verdict(plan: Plan, rank: RankPlan) -> str:
    room = (plan.available - rank.peak) / GIB
    return f"fits, {room:.1f} left" if room >= 0 else f"{-room:.1f} too much"


def _style_of_fit(row: list[str]) -> str:
    return "red" if any(cell.endswith("too much") for cell in row) else ""
