"""The report as a picture."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from torchtitan.tools.figures import COLORS, DASHES, grid

from .charts import Chart, build_charts, number
from .page import title_of
from .run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANELS = 6


def draw(runs: list[Run]) -> Figure:
    """The first few charts: loss, validation loss, gradient norm, ..."""
    charts = build_charts(runs)[:_PANELS]
    columns = min(len(charts), 3)
    rows = math.ceil(len(charts) / columns)
    with matplotlib.rc_context({"font.size": 9.5, "axes.spines.top": False}):
        figure = Figure(figsize=(11, 0.8 + 2.7 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).flat
        for chart, axes in zip(charts, panels, strict=False):
            _draw(axes, chart)
        for axes in list(panels)[len(charts) :]:
            axes.set_visible(False)
        if len(runs) > 1:
            handles = [matplotlib.lines.Line2D([], [], **_style(i)) for i in range(len(runs))]
            names = [run.name for run in runs]
            figure.legend(
                handles, names, loc="outside lower center", ncols=min(len(runs), 6), frameon=False
            )
        figure.suptitle(title_of(runs), fontsize=12)
    return figure


def _draw(axes: Axes, chart: Chart) -> None:
    for line in chart.lines:
        style = _style(line.run)
        if line.low:
            axes.fill_between(
                line.steps, line.low, line.high, color=style["color"], alpha=0.18, linewidth=0
            )
        marker = "." if len(line.steps) < 30 else ""
        axes.plot(line.steps, line.mean, marker=marker, **style)
    axes.set_title(f"{chart.title} ({chart.unit})" if chart.unit else chart.title, loc="left")
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    grid(axes)


def _style(run: int) -> dict[str, Any]:
    dash = "-" if run < len(COLORS) else DASHES[run // len(COLORS) % len(DASHES)]
    return {"color": COLORS[run % len(COLORS)], "linestyle": dash, "linewidth": 1.4}
