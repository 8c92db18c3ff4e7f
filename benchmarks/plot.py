"""Draws the measurements of a page as a picture: a panel per table, a bar per row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.report import Table
from torchtitan.tools.text import three_digits

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOR, TARGET_COLOR = "#4269d0", "#d03b3b"


def draw(tables: Sequence[Table], path: Path) -> bool:
    """Write a PNG of the tables that have bars; return whether there are any."""
    shown = [table for table in tables if table.bars]
    if not shown:
        return False
    rows = [len(table.bars) for table in shown]
    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9, sum(0.9 + 0.32 * n for n in rows)), layout="constrained")
        panels = figure.subplots(len(shown), squeeze=False, height_ratios=[n + 2 for n in rows])
        for axes, table in zip(panels[:, 0], shown, strict=True):
            _panel(axes, table)
        figure.savefig(path, format="png", dpi=110, metadata={"Software": None})
    return True


def _panel(axes: Axes, table: Table) -> None:
    """Draw medians as bars, ranges as whiskers, targets as ticks across their bars."""
    for row, bar in enumerate(table.bars):
        low, high = bar.spread.median - bar.spread.low, bar.spread.high - bar.spread.median
        axes.barh(row, bar.spread.median, height=0.6, color=COLOR, xerr=[[low], [high]], capsize=3)
        if bar.target is not None:
            axes.vlines(bar.target, row - 0.42, row + 0.42, color=TARGET_COLOR, linewidth=2)
    names = [f"{bar.name}  {three_digits(bar.spread.median)}" for bar in table.bars]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    targets = any(bar.target is not None for bar in table.bars)
    axes.set_xlabel(table.bar_label + ("; red: the target" if targets else ""))
    axes.set_title(table.title, loc="left", fontsize=10)
