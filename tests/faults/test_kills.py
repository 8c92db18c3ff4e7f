"""Runs that are killed at any moment and started again are equal, bit for bit, to undisturbed ones.

`pytest tests/faults --kills 100` kills 100 times; the end of its output has the figures.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from random import Random

import pytest
from harness import read_lines, run_ranks
from kills import Job, Tally, curve, kill_and_finish

JOBS = {
    "1_process": Job(1, "disabled"),
    "1_process_async": Job(1, "async"),
    "4_processes": Job(4, "disabled"),
    "4_processes_async": Job(4, "async"),
}


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "name",
    [
        *["1_process", "4_processes_async"],
        pytest.param("1_process_async", marks=pytest.mark.long),
        pytest.param("4_processes", marks=pytest.mark.long),
    ],
)
def test_killed_runs_go_on_as_if_nothing_had_happened(
    name: str, tmp_path: Path, pytestconfig: pytest.Config, figures: dict[str, object]
) -> None:
    kills = max(1, pytestconfig.getoption("--kills") // len(JOBS))
    run_ranks(os.getpid, 1)  # from now on PyTorch is imported, and runs take their usual time
    job, random = JOBS[name], Random(f"{name} {kills}")
    tally = figures[f"kills, {name.replace('_', ' ')}"] = Tally()
    whole = tmp_path / "whole"
    job.finish(whole)
    expected = curve(read_lines(whole / "metrics.jsonl"))
    failures = []
    while tally.tried < kills:
        folder = tmp_path / f"from-{tally.tried}"
        try:
            # The second kill may come while the run resumes from the first.
            kill_and_finish(job, folder, min(2, kills - tally.tried), random, expected, tally)
        except AssertionError as failure:
            failures.append(f"{folder.name}: {failure}")
        else:
            shutil.rmtree(folder)
    assert not failures, "\n\n".join(failures)
