"""Draws the report as a picture."""

from __future__ import annotations

import math
import textwrap
from functools import partial
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from torchtitan.tools.figures import COLORS, DASHES, grid

from .charts import Chart, build_charts, finite, number, tick_step
from .page import title_of
from .run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

_PANELS = 6
_BAD = "#b00020"


def draw(runs: list[Run]) -> Figure:
    """Draw the first few charts: loss, validation loss, gradient norm, ..."""
    charts = build_charts(runs)[:_PANELS]
    columns = min(len(charts), 3)
    rows = math.ceil(len(charts) / columns)
    with matplotlib.rc_context({"font.size": 9.5, "axes.spines.top": False}):
        names = [_short(run.name) for run in runs] if len(runs) > 1 else []
        # About 150 characters fit below the panels; a line's sample and the gaps take 9.
        legend_columns = max(1, min(6, 146 // (9 + max(map(len, names), default=0))))
        height = 0.8 + 2.7 * rows + 0.19 * math.ceil(len(names) / legend_columns)
        figure = Figure(figsize=(11, height), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).flat
        for chart, axes in zip(charts, panels, strict=False):
            _draw(axes, chart)
        for axes in list(panels)[len(charts) :]:
            axes.set_visible(False)
        if names:
            handles = [matplotlib.lines.Line2D([], [], **_style(i)) for i in range(len(runs))]
            figure.legend(
                handles, names, loc="outside lower center", ncols=legend_columns, frameon=False
            )
        title = textwrap.fill(title_of(runs), width=105, max_lines=2, placeholder=" ...")
        figure.suptitle(title, fontsize=12)
    return figure


def _short(name: str) -> str:
    """Return both ends of a long name, since runs often differ at the end."""
    return name if len(name) <= 64 else f"{name[:30]}...{name[-31:]}"


def _draw(axes: Axes, chart: Chart) -> None:
    for line in chart.lines:
        style = _style(line.run)
        if line.low:
            axes.fill_between(
                line.steps, line.low, line.high, color=style["color"], alpha=0.18, linewidth=0
            )
        marker = "." if len(line.steps) < 30 else ""
        axes.plot(line.steps, line.mean, marker=marker, **style)
        if line.marks:  # at the lower edge, as on the page
            at = axes.get_xaxis_transform()
            axes.plot(line.marks, [0] * len(line.marks), "^", color=_BAD, transform=at, zorder=3)
    values = finite(chart)
    if chart.from_zero and min(values, default=-1) >= 0 < max(values, default=0):
        axes.set_ylim(0, 1.04 * max(values))
    axes.set_title(f"{chart.title} ({chart.unit})" if chart.unit else chart.title, loc="left")
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(partial(_label, axis)))
    grid(axes)


def _label(axis: Axis, value: float, _position: int) -> str:
    return number(value, tick_step(list(axis.get_majorticklocs())))


def _style(run: int) -> dict[str, Any]:
    dash = "-" if run < len(COLORS) else DASHES[run // len(COLORS) % len(DASHES)]
    return {"color": COLORS[run % len(COLORS)], "linestyle": dash, "linewidth": 1.4}
