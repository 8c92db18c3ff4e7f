"""The judgement of two curves."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from run_folder import write_run

from torchtitan.commands.converge.compare import (
    RTOL_BFLOAT16,
    RTOL_FLOAT32,
    Difference,
    Outcome,
    Verdict,
    default_tolerances,
    judge,
    relative,
)
from torchtitan.commands.converge.curves import METRICS, read_curves, read_skipped
from torchtitan.commands.converge.report import verdict_line
from torchtitan.commands.converge.runs import open_run
from torchtitan.config import JobConfig
from torchtitan.errors import ConfigError


def outcome(folder: Path, failure: str | None = None) -> Outcome:
    run = open_run(folder.name, str(folder))
    return Outcome(run, read_curves(folder), failure, read_skipped(folder))


def verdict(tmp_path: Path, control: list, test: list, *options: str, **given) -> Verdict:
    """The control's and the test's losses, compared."""
    first = outcome(write_run(tmp_path / "control", control, *options))
    return judge(first, outcome(write_run(tmp_path / "test", test, *options)), **given)


def test_relative_difference() -> None:
    control = {1: 4.0, 2: -2.0, 3: 0.0, 4: 0.0, 5: math.nan, 6: 1.0}
    test = {1: 4.0, 2: -1.0, 3: 0.0, 4: 1.0, 5: 1.0, 7: 1.0}
    found = relative(control, test)
    assert list(found) == [1, 2, 3, 4, 5]
    assert [found[step] for step in (1, 2, 3, 4)] == [0.0, 0.5, 0.0, math.inf]
    assert math.isnan(found[5])


def test_difference_finds_the_first_and_the_worst_step() -> None:
    difference = Difference(1e-2, {1: 0.0, 2: 0.02, 3: 0.05, 4: 1e-3})
    assert (difference.first_exceeding, difference.worst_step) == (2, 3)
    assert (difference.worst, difference.final) == (0.05, 1e-3)


def test_the_tolerance_itself_is_allowed() -> None:
    assert Difference(0.5, {1: 0.5}).first_exceeding is None
    assert Difference(0.5, {1: math.nextafter(0.5, 1)}).first_exceeding == 1


def test_nan_exceeds_every_tolerance() -> None:
    difference = Difference(math.inf, {1: math.inf, 2: math.nan})
    assert (difference.first_exceeding, difference.worst_step) == (2, 2)


def test_equal_within_the_tolerance(tmp_path: Path) -> None:
    found = verdict(tmp_path, [3.0, 2.0, 1.0], [3.0001, 2.0001, 1.00009])
    assert found.state == "equal"
    assert found.differences["loss"].worst == pytest.approx(9e-5)
    assert found.differences["grad_norm"].worst == 0


def test_diverged_beyond_the_tolerance(tmp_path: Path) -> None:
    found = verdict(tmp_path, [3.0, 2.0, 1.0], [3.0, 2.0, 1.00011])
    assert found.state == "diverged"
    assert found.differences["loss"].first_exceeding == 3


def test_the_gradient_norm_alone_can_diverge(tmp_path: Path) -> None:
    losses = [3.0, 2.0, 1.0]
    control = outcome(write_run(tmp_path / "control", losses))
    norms = [1.0, 1.0, 1.0 + 2 * RTOL_FLOAT32["grad_norm"]]
    test = outcome(write_run(tmp_path / "test", losses, grad_norms=norms))
    found = judge(control, test)
    assert found.state == "diverged"
    assert found.differences["loss"].first_exceeding is None
    assert found.differences["grad_norm"].first_exceeding == 3
    assert judge(control, test, grad_norm_rtol=0.1).state == "equal"


def test_given_tolerances_win(tmp_path: Path) -> None:
    losses = [3.0, 2.0, 1.0], [3.0, 2.0, 1.5]
    assert verdict(tmp_path, *losses, rtol=0.6).state == "equal"
    assert verdict(tmp_path / "strict", *losses, rtol=0.4).state == "diverged"


@pytest.mark.parametrize("key", ["mixed_precision_param", "mixed_precision_reduce"])
def test_bfloat16_in_one_run_widens_the_tolerance(key: str) -> None:
    full, mixed = JobConfig(), JobConfig()
    full.training.mixed_precision_param = mixed.training.mixed_precision_param = "float32"
    assert default_tolerances([full, full]) == RTOL_FLOAT32
    setattr(mixed.training, key, "bfloat16")
    assert default_tolerances([full, mixed]) == RTOL_BFLOAT16


def test_missing_steps_fail(tmp_path: Path) -> None:
    found = verdict(tmp_path, [3.0, 2.0, 1.0], [3.0], "--training.steps=3")
    assert found.state == "failed"
    assert found.problems == ["no loss and grad_norm of steps 2-3 (of 3)"]
    assert list(found.differences["loss"].relative) == [1]  # still shown


def test_a_metric_that_was_never_logged_fails(tmp_path: Path) -> None:
    control = outcome(write_run(tmp_path / "control", [3.0, 2.0, 1.0]))
    test = outcome(write_run(tmp_path / "test", [3.0, 2.0, 1.0]))
    test.curves["grad_norm"] = {}
    assert judge(control, test).problems == ["no grad_norm of steps 1-3 (of 3)"]


def test_values_that_are_not_finite_fail(tmp_path: Path) -> None:
    found = verdict(tmp_path, [3.0, 2.0, 1.0], [3.0, None, None])
    assert found.state == "failed"
    assert found.problems == ["loss is not finite at steps 2-3"]


def test_a_failed_job_fails_even_if_its_curves_are_whole(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "control", [3.0, 2.0, 1.0])
    found = judge(outcome(folder), outcome(folder, failure="exit code 1"))
    assert (found.state, found.problems) == ("failed", ["exit code 1"])


def test_a_failed_control_fails_every_test(tmp_path: Path) -> None:
    control = outcome(write_run(tmp_path / "control", [3.0, 2.0], "--training.steps=3"))
    test = outcome(write_run(tmp_path / "test", [3.0, 2.0, 1.0]))
    assert judge(control, test).problems == ["the control failed"]
    test.curves = {name: {} for name in METRICS}
    nothing = judge(control, test).differences["loss"]
    assert nothing.worst_step is None
    assert math.isnan(nothing.worst)


def test_a_line_that_was_cut_off_is_a_missing_step(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "cut", [3.0, 2.0, 1.0])
    metrics = folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-20])
    assert list(read_curves(folder)["loss"]) == [1, 2]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "bad", [3.0, 2.0, 1.0])
    metrics = folder / "metrics.jsonl"
    first, _, third = metrics.read_text().splitlines()
    metrics.write_text(f"{first}\noops\n{third}\n")
    with pytest.raises(ConfigError, match=r"metrics.jsonl:2: not a logged step: 'oops'"):
        read_curves(folder)


def skipping(folder: Path, losses: list[float | None]) -> Outcome:
    """A run that has no loss where the guard skipped the step."""
    write_run(folder, losses, "--training.on_spike=skip")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows, start=1):
        row["steps_skipped"] = losses[:number].count(None)
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return outcome(folder)


def test_steps_that_the_guard_skipped_in_both_are_left_out(tmp_path: Path) -> None:
    found = [skipping(tmp_path / name, [3.0, None, 1.0]) for name in ("control", "test")]
    same = judge(*found)
    assert (same.state, same.problems, [*same.differences["loss"].relative]) == (
        "equal",
        [],
        [1, 3],
    )
    assert verdict_line(same, "control").endswith(
        "the guard skipped 1 of the steps (step 2) in both"
    )


def test_runs_that_skipped_other_steps_have_diverged(tmp_path: Path) -> None:
    control = skipping(tmp_path / "control", [3.0, 2.0, 1.0])
    other = judge(control, skipping(tmp_path / "test", [3.0, None, 1.0]))
    assert (other.state, other.problems) == ("diverged", [])
    assert verdict_line(other, "control") == (
        "test: DIVERGED from control: the guard skipped 1 of the steps (step 2), in control none"
    )


def test_runs_with_no_step_in_common_have_failed(tmp_path: Path) -> None:
    control = skipping(tmp_path / "control", [3.0, None, None])
    assert judge(control, skipping(tmp_path / "test", [None, 2.0, 1.0])).state == "failed"
    nothing = skipping(tmp_path / "all", [None] * 3)
    assert nothing.problems() == ["the guard skipped all 3 steps"]


def test_a_step_that_was_not_logged_is_missing_all_the_same(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [3.0, 2.0], "--training.on_spike=skip")
    assert outcome(folder).problems() == ["no loss and grad_norm of step 3 (of 3)"]
