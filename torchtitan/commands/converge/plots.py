"""Draws the curves: values above, relative differences from the control below."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from torchtitan.tools.figures import COLORS, DASHES, grid

from .curves import METRICS, Curve
from .report import Result, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LABELS = {"loss": "loss per token", "grad_norm": "gradient norm, before clipping"}

_LIMIT = "#B00020"
_ZERO = 1e-9
"""Where a difference of 0 is drawn, since a log scale has no 0."""


def draw(result: Result) -> Figure:
    """Draw four panels: loss and gradient norm, each above its difference from the control."""
    with matplotlib.rc_context({"font.size": 9.5, "axes.spines.top": False}):
        figure = Figure(figsize=(11, 7.2), layout="constrained")
        panels = figure.subplots(2, 2, sharex=True, height_ratios=(1.15, 1))
        for column, metric in enumerate(METRICS):
            _draw_values(panels[0, column], result, metric)
            _draw_differences(panels[1, column], result, metric)
        handles, labels = panels[0, 0].get_legend_handles_labels()
        columns = len(labels) if sum(map(len, labels)) < 100 else 3
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
        figure.suptitle(_title(result), fontsize=12)
    return figure


def svg(figure: Figure) -> str:
    """Return an `<svg>` element to put into a page; its text remains text."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "converge"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _draw_values(axes: Axes, result: Result, metric: str) -> None:
    control = result.control
    name = f"{control.run.name} (control)"
    axes.plot(*_points(control.curves[metric]), color="black", linewidth=3, alpha=0.35, label=name)
    for number, verdict in enumerate(result.verdicts):
        curve = verdict.outcome.curves[metric]
        label = f"{verdict.name}: {verdict.state}"
        axes.plot(*_points(curve), **_style(number), label=label)
    axes.set_ylabel(_LABELS[metric])
    grid(axes)


def _draw_differences(axes: Axes, result: Result, metric: str) -> None:
    highest = 0.0
    for number, verdict in enumerate(result.verdicts):
        difference = verdict.differences[metric]
        curve = {step: max(value, _ZERO) for step, value in difference.relative.items()}
        axes.plot(*_points(curve), **_style(number) | {"linestyle": "-", "linewidth": 1.2})
        first = difference.first_exceeding
        if first is not None:
            axes.plot(first, curve[first], "x", color=_LIMIT, markersize=8, markeredgewidth=2)
        highest = max([highest, *(value for value in curve.values() if value < float("inf"))])
    tolerances = {verdict.differences[metric].tolerance for verdict in result.verdicts}
    for tolerance in tolerances:
        axes.axhline(tolerance, color=_LIMIT, linestyle="--", linewidth=1.2)
        axes.annotate(
            f"tolerance {short(tolerance, 3)}",
            (0.01, tolerance),  # on the left, where the runs have not diverged yet
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            color=_LIMIT,
        )
    axes.set_yscale("log")
    axes.set_ylim(_ZERO / 2, 10 * max(highest, *tolerances))
    axes.yaxis.set_major_locator(FixedLocator([10.0**power for power in range(-9, 10)]))
    axes.yaxis.set_minor_locator(FixedLocator([]))
    axes.yaxis.set_major_formatter(FuncFormatter(_power))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("step")
    axes.set_ylabel(f"relative difference of {metric}")
    grid(axes)


def _points(curve: Curve) -> tuple[list[int], list[float]]:
    steps = sorted(curve)
    return steps, [curve[step] for step in steps]


def _style(number: int) -> dict[str, Any]:
    return {
        "color": COLORS[number % len(COLORS)],
        "linestyle": DASHES[number % len(DASHES)],
        "linewidth": 1.6,
    }


def _power(value: float, _position: int) -> str:
    exponent = f"{value:.0e}".partition("e")[2]
    return "0" if value == _ZERO else f"$10^{{{int(exponent)}}}$"


def _title(result: Result) -> str:
    """Format `Equal to one: fsdp2, tp2. Diverged: ddp2.`"""
    parts = []
    for state, words in {
        "equal": f"Equal to {result.control.run.name}",
        "diverged": f"Diverged from {result.control.run.name}",
        "failed": "Failed",
    }.items():
        names = [verdict.name for verdict in result.verdicts if verdict.state == state]
        if names:
            parts.append(f"{words}: {', '.join(names)}.")
    return "\n".join(parts)
