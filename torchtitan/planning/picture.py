"""Draws a plan as a PNG picture: memory by category, with the pipeline's timeline below."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchtitan.tools import figures

from .devices import GIB
from .page import ACTIONS
from .plan import Plan
from .report import CATEGORIES, headline
from .schedule import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_ROWS = 64  # more rows are indistinguishable


def png(plan: Plan) -> bytes:
    """Return the bytes of the PNG file."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = min(len(plan.ranks), _MOST_ROWS)
    panels = 2 if plan.timeline else 1
    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, panels * (1.6 + 0.24 * rows)), layout="constrained")
        axes = figure.subplots(panels, squeeze=False)[:, 0]
        _draw_memory(axes[0], plan, rows)
        if plan.timeline:
            _draw_timeline(axes[1], plan, plan.timeline, rows)
        figure.suptitle(headline(plan), fontsize=11)
        return figures.png(figure)


def _draw_memory(axes: Axes, plan: Plan, rows: int) -> None:
    """Draw a bar for each pipeline rank, in GiB, and a line at the device's limit."""
    left = [0.0] * rows
    for name, (label, color) in CATEGORIES.items():
        sizes = [getattr(rank.memory, name) / GIB for rank in plan.ranks[:rows]]
        if max(sizes) > 0:
            axes.barh(range(rows), sizes, left=left, color=color, label=label)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    available = plan.available / GIB
    axes.axvline(available, color="#d00", label=f"the device's, {available:.1f} GiB")
    axes.set_xlabel("GiB of a rank at its peak")
    _finish(axes, rows)


def _draw_timeline(axes: Axes, plan: Plan, timeline: Timeline, rows: int) -> None:
    """Draw the actions of each pipeline rank over time. Later stages of a rank are paler."""
    for row, spans in enumerate(list(timeline.spans.values())[:rows]):
        stages = sorted({action.stage for action, _, _ in spans})
        axes.broken_barh(
            [(start, end - start) for _, start, end in spans],
            (row - 0.4, 0.8),
            facecolors=[
                (ACTIONS[action.kind][1], 1 - 0.5 * stages.index(action.stage) / len(stages))
                for action, _, _ in spans
            ],
            edgecolor="white",
            linewidth=0.3,
        )
    kinds = {action.kind for spans in timeline.spans.values() for action, _, _ in spans}
    for kind, (label, color) in ACTIONS.items():
        if kind in kinds:
            axes.barh(0, 0, color=color, label=label)
    paler = "; later stages of a rank are paler" if len(plan.ranks[0].stages) > 1 else ""
    axes.set_xlabel(f"seconds; bubble {100 * plan.bubble:.1f}%{paler}")
    _finish(axes, rows)


def _finish(axes: Axes, rows: int) -> None:
    axes.set_ylabel("pipeline rank")
    axes.set_ylim(rows - 0.5, -0.5)  # rank 0 on top
    axes.set_yticks(range(0, rows, max(1, rows // 16)))
    axes.set_xlim(left=0)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
