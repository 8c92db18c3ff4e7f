"""Ticks, numbers and lines of the charts."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
from report_folder import write_run

from torchtitan.commands.report.charts import build_charts, look, number, svg, ticks, to_json
from torchtitan.commands.report.run import read_runs


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.25, "0.25"),
        (3e-4, "3e-4"),
        (-1.5e-5, "-1.5e-5"),
        (1234.0, "1234"),
        (12_500.0, "12.5K"),
        (1.5e6, "1.5M"),
        (2e9, "2B"),
        (5e15, "5000T"),
        (-2.5e30, "-2.5e30"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ((100_020.0, 100_040.0), ["100.02K", "100.04K"]),
        ((2.3452, 2.3454), ["2.3452", "2.3454"]),
        ((1.79998e-4, 1.8e-4), ["1.79998e-4", "1.8e-4"]),
        ((-100_001.0, -100_000.0), ["-100.001K", "-100K"]),
        ((0.0, 500_000.0), ["0", "500K"]),
        ((0.5, 0.5), ["0.5", "0.5"]),
    ],
)
def test_neighbours_on_an_axis_have_different_labels(
    values: tuple[float, float], texts: list[str]
) -> None:
    assert [number(value, values[1] - values[0]) for value in values] == texts


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 10.0, [0.0, 5.0, 10.0]),
        (1.9, 5.7, [2.0, 3.0, 4.0, 5.0]),
        (0.0, 3e-4, [0.0, 1e-4, 2e-4, 3e-4]),
        (-1.0, 1.0, [-1.0, -0.5, 0.0, 0.5, 1.0]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high, 4) == pytest.approx(expected)


def test_points_stand_for_all_steps(tmp_path: Path) -> None:
    losses = [float(i % 10) for i in range(5000)]
    [chart, *_] = build_charts(read_runs([str(write_run(tmp_path / "run", losses))]))
    [line] = chart.lines
    assert len(line.steps) == 500 and line.steps[-1] == 5000
    assert line.mean == pytest.approx([4.5] * 500)
    assert line.low == [0.0] * 500 and line.high == [9.0] * 500


def test_blocks_share_a_chart(tmp_path: Path) -> None:
    norms = {"grad_norm/layers.0": 1.0, "grad_norm/layers.1": 2.0, "grad_norm/output": 6.0}
    runs = [write_run(tmp_path / "a", [1.0] * 3, **norms), write_run(tmp_path / "b", [1.0] * 3)]
    charts = build_charts(read_runs([str(run) for run in runs]))
    [chart] = [chart for chart in charts if chart.title == "Gradient norms of the blocks"]
    [line] = chart.lines
    assert (line.run, line.steps, line.mean) == (0, [1, 2, 3], [3.0] * 3)
    assert (line.low, line.high) == ([1.0] * 3, [6.0] * 3)
    assert not any("layers" in chart.title for chart in charts)


def test_a_count_is_never_a_mean(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [2.0] * 1500)
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row |= {"rollbacks": row["step"] // 500, "tokens_seen": row["step"] * 64}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    charts = {chart.title: chart.lines[0] for chart in build_charts(read_runs([str(run)]))}
    assert len(charts["Rollbacks"].mean) == 500
    assert set(charts["Rollbacks"].mean) == {0, 1, 2, 3} and charts["Rollbacks"].mean[-1] == 3
    assert charts["Tokens seen"].mean == [64 * step for step in charts["Tokens seen"].steps]


def test_a_line_is_broken_where_a_value_is_not_finite(tmp_path: Path) -> None:
    runs = read_runs([str(write_run(tmp_path / "run", [3.0, None, 1.0, 2.0]))])
    charts = build_charts(runs)
    [line] = charts[0].lines
    assert math.isnan(line.mean[1]) and line.marks == [2]
    drawn = svg(charts[0], runs)
    path = drawn.partition('class="line c0" d="')[2].partition('"')[0]
    assert path.count("M") == 2 and "nan" not in drawn
    assert drawn.count('class="mark"') == 1
    assert to_json(runs, charts)["charts"][0]["lines"][0]["mean"][1] is None


def test_marks_of_a_long_run_are_where_it_was_not_finite(tmp_path: Path) -> None:
    losses = [None if i % 10 == 0 or 2000 < i < 2300 else 2.0 for i in range(1, 5001)]
    losses[3000:4000] = [2.0] * 1000
    [chart, *_] = build_charts(read_runs([str(write_run(tmp_path / "run", losses))]))
    [line] = chart.lines
    assert all(losses[step - 1] is None for step in line.marks) and len(line.marks) <= 100
    gaps = [b - a for a, b in pairwise([0, *line.marks])]
    assert max(gaps) < 1100 and sum(gap > 100 for gap in gaps) == 1 and line.marks[-1] == 5000


@pytest.mark.parametrize(
    "losses",
    [
        [2.0],
        [2.0, 2.0, 2.0],
        [0.0, 0.0],
        [None, None],
        [-1e-320],
        [1e308, -1e308],
        [2e303, 3e303],
        [5e-324, 1e-323],
    ],
)
def test_any_values_can_be_drawn(tmp_path: Path, losses: list[float | None]) -> None:
    runs = read_runs([str(write_run(tmp_path / "run", losses))])
    for chart in build_charts(runs):
        drawn = svg(chart, runs)
        assert "nan" not in drawn and "inf" not in drawn


def test_points_that_stand_for_several_steps_are_no_dots(tmp_path: Path) -> None:
    runs = read_runs([str(write_run(tmp_path / "run", [2.0, 1.0] * 50))]) * 200
    chart = build_charts(runs)[0]
    assert len(chart.lines[0].steps) < 100 and 'class="dots' not in svg(chart, runs)


def test_seven_runs_can_be_told_apart(tmp_path: Path) -> None:
    runs = read_runs([str(write_run(tmp_path / str(i), [2.0, 1.0])) for i in range(7)])
    drawn = svg(build_charts(runs)[0], runs)
    assert 'class="line c0"' in drawn and 'class="line c0 d1"' in drawn


def test_three_dashes_take_turns() -> None:
    looks = [look(run) for run in range(24)]
    assert len(set(looks)) == 24 and looks[:6] == [f"c{i}" for i in range(6)]
    assert [look(run) for run in (24, 29)] == ["c0 d1", "c5 d1"]


@pytest.mark.parametrize(("steepness", "digits"), [(1e-7, 12), (1.0, 5)])
def test_a_curve_has_as_many_digits_as_its_slope_needs(
    tmp_path: Path, steepness: float, digits: int
) -> None:
    losses: list[float | None] = [2 + steepness * i / 300 + 1e-13 for i in range(300)]
    runs = read_runs([str(write_run(tmp_path / "run", losses))])
    charts = build_charts(runs)
    mean = to_json(runs, charts)["charts"][0]["lines"][0]["mean"]
    assert len(set(mean)) == 300
    longest = max(len(str(value).replace(".", "")) for value in mean)
    assert longest == digits


def test_labels_are_whole(tmp_path: Path) -> None:
    """The last step's at the right edge, and a long one at the left."""
    run = write_run(tmp_path / "run", [1.79994e-4 + i * 1e-10 for i in range(61)])
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text.replace('{"step": ', '{"step": 1000'))
    runs = read_runs([str(run)])
    drawn = svg(build_charts(runs)[0], runs)
    labels = re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="(\w+)">(.*?)</text>', drawn)
    assert len({text for *_, text in labels}) == len(labels) > 5
    for x, anchor, text in labels:
        width = 7 * len(text)
        before, after = (width, 0) if anchor == "end" else (width / 2, width / 2)
        assert float(x) - before > -2 and float(x) + after < 380, text
