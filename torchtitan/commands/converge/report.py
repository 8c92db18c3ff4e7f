"""Formats the result as text: lines for the terminal, a Markdown table, JSON."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtitan.components.environment import environment
from torchtitan.tools.result_file import write_json, write_result
from torchtitan.tools.tables import console, rich_table

from .compare import Difference, Outcome, Verdict, step_ranges
from .curves import METRICS
from .match import differences

HEADER = [
    "run",
    "processes",
    "layout",
    "final loss",
    "loss: largest difference",
    "grad_norm: largest difference",
    "verdict",
]

DETAIL_HEADER = ["run", "metric", "tolerance", "first step beyond", "largest", "final"]

STATES = {"control": "", "equal": "green", "diverged": "red", "failed": "red"}


@dataclass
class Result:
    """A completed comparison."""

    control: Outcome
    verdicts: list[Verdict]
    allowed: list[str]
    """Keys that were allowed to differ."""
    command: str

    @property
    def equal(self) -> bool:
        return all(verdict.state == "equal" for verdict in self.verdicts)

    @property
    def outcomes(self) -> list[Outcome]:
        return [self.control, *(verdict.outcome for verdict in self.verdicts)]

    @property
    def config_differences(self) -> dict[str, list[str]]:
        """Key -> value in each of `outcomes`."""
        return differences([outcome.run for outcome in self.outcomes])


def rows(result: Result) -> list[list[str]]:
    """Return the cells of the table under `HEADER`, the control first."""
    table = [[*_description(result.control), "", "", "control"]]
    for verdict in result.verdicts:
        cells = [_at_step(verdict.differences[name]) for name in METRICS]
        table.append([*_description(verdict.outcome), *cells, verdict.state])
    return table


def show(result: Result, out: Path) -> None:
    """Print the table and the verdicts to stdout."""
    table = rich_table(HEADER, rows(result), (0, 2, 6), style=lambda row: STATES[row[-1]])
    console(160).print(table)
    summary = f"{'All equal' if result.equal else 'Not all equal'}. Report in {out}"
    sys.stdout.write("\n".join([*verdict_lines(result), summary]) + "\n")


def verdict_lines(result: Result) -> list[str]:
    """Describe the result of each test, after the problems of the control, if it has any."""
    name, problems = result.control.run.name, result.control.problems()
    failed = [f"{name} (control): FAILED: {'; '.join(problems)}"] if problems else []
    return failed + [verdict_line(verdict, name) for verdict in result.verdicts]


def verdict_line(verdict: Verdict, control: str) -> str:
    """Describe the result of one test in a sentence (several lines if a job failed)."""
    if verdict.state == "failed":
        return f"{verdict.name}: FAILED: {'; '.join(verdict.problems)}"
    parts = []
    for name, difference in verdict.differences.items():
        first = difference.first_exceeding
        if verdict.state == "equal":
            within = _at_step(difference)
            parts.append(f"{name} within {within} (tolerance {short(difference.tolerance, 3)})")
        elif first is not None:
            parts.append(
                f"{name} beyond {short(difference.tolerance, 3)} from step {first} "
                f"({short(difference.relative[first])}), at most {_at_step(difference)}"
            )
    if skips := _skips(verdict, control):
        parts.append(skips)
    word = "EQUAL to" if verdict.state == "equal" else "DIVERGED from"
    return f"{verdict.name}: {word} {control}: {'; '.join(parts)}"


def _skips(verdict: Verdict, control: str) -> str:
    """Describe the steps skipped by the guard in the two runs; "" if none."""
    here, there = verdict.outcome.skipped, verdict.control_skipped
    if here == there:
        return f"the guard skipped {_steps(here)} in both" if here else ""
    return f"the guard skipped {_steps(here)}, in {control} {_steps(there)}"


def _steps(steps: set[int]) -> str:
    """Format `2 of the steps (steps 3, 7)`."""
    return f"{len(steps)} of the steps ({step_ranges(steps)})" if steps else "none"


def detail_rows(result: Result) -> list[list[str]]:
    """Return the cells under `DETAIL_HEADER`: a line for each test and metric."""
    details = []
    for verdict in result.verdicts:
        for name, difference in verdict.differences.items():
            first = difference.first_exceeding
            cells = [verdict.name, name, short(difference.tolerance, 3), str(first or "none")]
            details.append([*cells, _at_step(difference), short(difference.final)])
    return details


def markdown(result: Result) -> str:
    """Return `table.md`: the summary, then each test's differences in detail."""
    summary = _markdown_table(HEADER, rows(result))
    details = _markdown_table(DETAIL_HEADER, detail_rows(result))
    return f"{summary}\nRelative differences from `{result.control.run.name}`:\n\n{details}"


def to_json(result: Result) -> dict[str, Any]:
    """Return `verdict.json`; null stands for a value that is not finite or not known."""
    runs = [
        {
            "name": outcome.run.name,
            "argument": outcome.run.argument,
            "folder": str(outcome.run.folder),
            "processes": outcome.run.processes,
            "layout": outcome.run.layout,
            "problems": outcome.problems(),
            "skipped_steps": sorted(outcome.skipped),
            "final_loss": _final(outcome),
        }
        for outcome in result.outcomes
    ]
    names = [run["name"] for run in runs]
    tests = [
        {
            "name": verdict.name,
            "state": verdict.state,
            "problems": verdict.problems,
            "metrics": {n: _difference_json(d) for n, d in verdict.differences.items()},
        }
        for verdict in result.verdicts
    ]
    return {
        "equal": result.equal,
        "control": result.control.run.name,
        "tests": tests,
        "runs": runs,
        "allowed_different": result.allowed,
        "config_differences": {
            key: dict(zip(names, values, strict=True))
            for key, values in result.config_differences.items()
        },
        "environment": environment(),
        "command": result.command,
    }


def write_text(result: Result, out: Path) -> None:
    """Write `verdict.json` and `table.md`."""
    write_json(str(out / "verdict.json"), to_json(result), "--out")
    write_result(str(out / "table.md"), markdown(result), "--out")


def short(value: float, digits: int = 2) -> str:
    """Format `1.2e-6`, `1e-4`, `0.16`, `0`, `nan`."""
    if not 0 < value < 0.1:
        return f"{value:.{digits}g}"
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    if "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}e{int(exponent)}"


def _description(outcome: Outcome) -> list[str]:
    run = outcome.run
    return [run.name, str(run.processes or "?"), run.layout, f"{_final(outcome):.5f}"]


def _final(outcome: Outcome) -> float:
    losses = outcome.curves["loss"]
    return losses[max(losses)] if losses else math.nan


def _at_step(difference: Difference) -> str:
    """Format `1.2e-6 (step 17)`."""
    if difference.worst_step is None:
        return "-"
    if difference.worst == 0:
        return "0"
    return f"{short(difference.worst)} (step {difference.worst_step})"


def _difference_json(difference: Difference) -> dict[str, Any]:
    return {
        "tolerance": difference.tolerance,
        "first_step_beyond": difference.first_exceeding,
        "largest": difference.worst,
        "largest_at_step": difference.worst_step,
        "final": difference.final,
    }


def _markdown_table(header: list[str], cells: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *cells]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)
