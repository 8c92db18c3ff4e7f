"""Builds a chart for each key, with few enough points for a page, and draws it.

The drawing is static SVG, so that the page can be read and printed without JavaScript;
`script.js` redraws the same charts for another width, scale or smoothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from typing import Any

from torchtitan.components.metric_keys import SECTIONS, STARTED_AT, VALIDATION, MetricKey, find

from .run import Curve, Run

WIDTH, HEIGHT = 380, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 10, 26
_CHARACTER = 7.6
"""Width of a digit in a label."""

MANY = 6
"""A page about more runs has no bands, which would hide each other, and a table row for each."""
_MOST_POINTS = 500
"""Points of a line; more are indistinguishable on a screen."""
_POINTS_OF_PAGE = 20_000
"""Points of all lines, with bands: about 1.5 megabytes."""
_MOST_MARKS = 100
_HUGE = 1e300
"""Limit of an axis, as its length must be finite; an axis shorter than 1e-300 has no length."""
_FEW = 30
"""Up to this number, points are marked by dots, since a line alone would not show them."""


@dataclass
class Line:
    """A run's part of a chart. Each point represents one or several logged steps."""

    run: int
    steps: list[int]
    mean: list[float]
    """Mean of the steps that a point represents; of a count, the last value."""
    low: list[float] = field(default_factory=list)
    """Lowest value of the steps that a point represents; empty if each represents one, or without a
    band."""
    high: list[float] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    """Steps whose value was not finite, or some of many, all along the line."""


@dataclass
class Chart:
    section: str
    title: str
    unit: str
    from_zero: bool
    lines: list[Line]


_Wanted = tuple[str, MetricKey, str, list[tuple[int, Curve]]]
"""Section, description, title, and the curves with the numbers of their runs."""


def build_charts(runs: list[Run]) -> list[Chart]:
    """Build a chart for each key that a run logged: known ones in their order, then the others."""
    wanted: list[_Wanted] = []
    for key in _in_order(runs):
        section, metric = find(key)
        title = metric.label
        if metric.key != key and not metric.spread:  # one of a family
            title = f"{metric.label}: {key.partition('/')[2]}"
        curves = [(i, curve) for i, run in enumerate(runs) if (curve := _curve(run, key))]
        wanted.append((section, metric, title, curves))
    wanted[1:1] = _validations(runs)
    number = max(sum(len(curves) for *_, curves in wanted), 1)
    bands = len(runs) <= MANY
    points = min(_MOST_POINTS, max(_POINTS_OF_PAGE * (1 if bands else 2) // number, _FEW + 1))
    return [
        Chart(
            section,
            title,
            metric.shown[0],
            metric.from_zero,
            [_line(run, curve, metric, points, bands) for run, curve in curves],
        )
        for section, metric, title, curves in wanted
    ]


def _validations(runs: list[Run]) -> list[_Wanted]:
    wanted = []
    for key in dict.fromkeys(key for run in runs for key in run.validation):
        family, _, source = key.partition("/")
        metric = MetricKey(key, f"Validation: {key}", "", "")  # a value of the author's validator
        title = metric.label
        if family == VALIDATION.key:
            metric, title = VALIDATION, VALIDATION.label + (f": {source}" if source else "")
        curves = [(i, run.validation[key]) for i, run in enumerate(runs) if key in run.validation]
        wanted.append((next(iter(SECTIONS)), metric, title, curves))
    return wanted


def _curve(run: Run, key: str) -> Curve | None:
    """Return the values of a key, or of all blocks of a family, one step after the other."""
    metric = find(key)[1]
    if not metric.spread:
        return run.curves.get(key)
    curves = [curve for other, curve in run.curves.items() if find(other)[1] is metric]
    points = [point for c in curves for point in zip(c.steps, c.values, strict=True)]
    points.sort(key=lambda point: point[0])
    return Curve([step for step, _ in points], [value for _, value in points]) if points else None


def _in_order(runs: list[Run]) -> list[str]:
    known = [entry.key for entries in SECTIONS.values() for entry in entries]
    sections = list(SECTIONS)

    def place(key: str) -> tuple[int, int, str]:
        section, metric = find(key)
        return (
            sections.index(section),
            known.index(metric.key) if metric.key in known else len(known),
            key,
        )

    keys = {key for run in runs for key in run.curves} - {STARTED_AT.key}
    families = {key: metric.key for key in keys if (metric := find(key)[1]).spread}
    return sorted({families.get(key, key) for key in keys}, key=place)


def _line(run: int, curve: Curve, metric: MetricKey, points: int, band: bool) -> Line:
    marks = [s for s, v in zip(curve.steps, curve.values, strict=True) if not math.isfinite(v)]
    if len(marks) > _MOST_MARKS:  # one for each part of the line that has any
        first, length = curve.steps[0], curve.steps[-1] - curve.steps[0] + 1
        marks = list({(step - first) * _MOST_MARKS // length: step for step in marks}.values())
    values = [value * metric.shown[1] for value in curve.values]
    points = min(points, len(set(curve.steps)))
    if len(values) <= points:
        return Line(run, curve.steps, values, marks=marks)
    line = Line(run, [], [], marks=marks)
    for i in range(points):
        begin, end = (len(values) * j // points for j in (i, i + 1))
        finite = [value for value in values[begin:end] if math.isfinite(value)]
        line.steps.append(curve.steps[end - 1])
        mean = sum(finite) / len(finite) if finite else math.nan
        line.mean.append(values[end - 1] if metric.count else mean)
        if band:
            line.low.append(min(finite, default=math.nan))
            line.high.append(max(finite, default=math.nan))
    return line


def to_json(runs: list[Run], charts: list[Chart]) -> dict[str, Any]:
    """Return the data for `script.js`; null if a value is not finite."""
    return {
        "runs": [run.name for run in runs],
        "charts": [
            {
                "title": chart.title,
                "fromZero": chart.from_zero,
                "lines": [
                    {
                        "run": line.run,
                        "steps": line.steps,
                        "mean": _rounded(line.mean, step),
                        "low": _rounded(line.low, step),
                        "high": _rounded(line.high, step),
                        "marks": line.marks,
                    }
                    for line in chart.lines
                ],
            }
            for chart in charts
            for step in [_least_step(chart)]
        ],
    }


def _least_step(chart: Chart) -> float:
    """Return the smallest difference that is visible on a screen."""
    low, high = _limits(finite(chart))
    return (high - low) / 2000


def _rounded(values: list[float], step: float) -> list[float | None]:
    return [
        float(f"{value:.{_digits(value, step, 5)}g}") if math.isfinite(value) else None
        for value in values
    ]


def finite(chart: Chart) -> list[float]:
    """Return all values that are drawn."""
    values = [value for line in chart.lines for value in line.mean + line.low + line.high]
    return [value for value in values if math.isfinite(value)]


def svg(chart: Chart, runs: list[Run]) -> str:
    """Draw the chart as an `<svg>` element."""
    low, high = _limits(finite(chart) + ([0.0] if chart.from_zero else []))
    room = 0.04 * (high - low)
    low, high = (low if chart.from_zero and low == 0 else low - room), high + room
    y = _place((low, high), HEIGHT - BOTTOM, TOP)
    values = _labelled(ticks(low, high, 5))
    left = max(LEFT, 6 + _CHARACTER * max(len(text) for _, text in values))
    steps = _limits([float(step) for line in chart.lines for step in line.steps])
    x = _place(steps, left, WIDTH - RIGHT)
    parts = [_axes(x, y, values, steps, left)]
    for line in chart.lines:
        if line.low:
            edge = list(zip(line.steps, line.high, strict=True))
            edge += reversed(list(zip(line.steps, line.low, strict=True)))
            shape = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in edge if math.isfinite(v))
            parts.append(f'<polygon class="band c{line.run % 6}" points="{shape}"/>')
    for line in chart.lines:
        parts.append(f'<path class="line {look(line.run)}" d="{_path(line, x, y)}"/>')
        if len(line.steps) <= _FEW:
            dots = zip(line.steps, line.mean, strict=True)
            path = "".join(f"M{x(s):.1f},{y(v):.1f}h.01" for s, v in dots if math.isfinite(v))
            parts.append(f'<path class="dots c{line.run % 6}" d="{path}"/>')
        parts += [
            f'<path class="mark" d="M{x(s) - 4:.1f},{HEIGHT - BOTTOM}l8,0l-4,-7z"/>'
            for s in line.marks
        ]
    label = escape(f"{chart.title}. {_in_words(chart, runs)}")
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg>"
    )


def look(run: int) -> str:
    """Return the classes of a run's line: six colours, then the same with each of three dashes."""
    return f"c{run % 6}" + (f" d{1 + (run // 6 - 1) % 3}" if run >= 6 else "")


def _axes(
    x: Callable[[float], float],
    y: Callable[[float], float],
    values: list[tuple[float, str]],
    steps: tuple[float, float],
    left: float,
) -> str:
    parts = []
    for tick, text in values:
        parts.append(
            f'<path class="grid" d="M{left:.1f},{y(tick):.1f}H{WIDTH - RIGHT}"/>'
            f'<text x="{left - 6:.1f}" y="{y(tick) + 4:.1f}" text-anchor="end">{text}</text>'
        )
    for tick, text in _labelled([tick for tick in ticks(*steps, 5) if tick == int(tick)]):
        middle = min(x(tick), WIDTH - _CHARACTER / 2 * len(text))  # not cut off at the edge
        parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{text}</text>')
    return "".join(parts)


def _labelled(places: list[float]) -> list[tuple[float, str]]:
    """Return ticks with their labels."""
    step = tick_step(places)
    return [(place, number(place, step)) for place in places]


def _path(line: Line, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    """Draw a line, interrupted where a value is not finite; a single point is a dot."""
    pieces: list[list[str]] = [[]]
    for step, value in zip(line.steps, line.mean, strict=True):
        if math.isfinite(value):
            pieces[-1].append(f"{x(step):.1f},{y(value):.1f}")
        elif pieces[-1]:
            pieces.append([])
    return "".join(f"M{piece[0]}L{' '.join(piece)}" for piece in pieces if piece)


def _place(limits: tuple[float, float], start: float, end: float) -> Callable[[float], float]:
    low, high = limits
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _limits(values: list[float]) -> tuple[float, float]:
    """Return the range of the values, widened if it is empty."""
    values = [min(max(value, -_HUGE), _HUGE) for value in values]
    low, high = min(values, default=0.0), max(values, default=1.0)
    if high - low > max(1e-9 * max(abs(low), abs(high)), 1 / _HUGE):
        return low, high
    room = 0.5 * abs(low) if abs(low) > 1 / _HUGE else 0.5
    return low - room, high + room


def ticks(low: float, high: float, most: int) -> list[float]:
    """Return round numbers between two, at most `most + 1`."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def tick_step(places: Sequence[float]) -> float:
    """Return the least distance between neighbours; 0 if there are no two."""
    return min((b - a for a, b in pairwise(places)), default=0.0)


def number(value: float, step: float = 0.0) -> str:
    """Format with at most about six characters: `0.25`, `3e-4`, `12.5K`, `1.5M`.

    With the `step` of an axis, add the digits that distinguish its ticks: `100.02K`.
    """
    size = abs(value)
    if size and not 1e-3 <= size < 1e16:
        mantissa, _, exponent = f"{value:.{_digits(value, step, 3) - 1}e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    digits = _digits(value, step, 4)
    for unit, of in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if size >= of * (10 if unit == "K" else 1):
            return f"{value / of:.{digits}g}{unit}"
    return f"{value:.{digits}g}"


def _digits(value: float, step: float, least: int) -> int:
    """Return the number of digits that distinguish a value from another one `step` away."""
    if not (value and step):
        return least
    first, last = (math.floor(math.log10(size) + 1e-9) for size in (abs(value), step))
    return min(max(least, first - last + 1), 15)


def _in_words(chart: Chart, runs: list[Run]) -> str:
    """Describe the chart for screen readers."""
    sentences = []
    for line in chart.lines:
        points = [
            (step, value)
            for step, value in zip(line.steps, line.mean, strict=True)
            if math.isfinite(value)
        ]
        if points:
            (first, start), (last, end) = points[0], points[-1]
            sentences.append(
                f"{runs[line.run].name}: {number(start)} at step {first}, "
                f"{number(end)} at step {last}."
            )
    return " ".join(sentences)
