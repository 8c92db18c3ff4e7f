"""Processes that srun starts without torchrun do not write into one folder."""

from __future__ import annotations

import pytest

from torchtitan.distributed.utils import refuse_separate_tasks
from torchtitan.errors import ConfigError
from torchtitan.train import main


@pytest.fixture(autouse=True)
def outside_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


def test_several_tasks_without_torchrun_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(ConfigError, match=r"srun has started 8 .*one torchrun on each host"):
        refuse_separate_tasks()
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2
    assert "SLURM_STEP_NUM_TASKS" in capsys.readouterr().err


@pytest.mark.parametrize(
    "env",
    [
        {"SLURM_STEP_NUM_TASKS": "8", "RANK": "3"},
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # a batch script
        {},
    ],
)
def test_one_process_and_those_of_torchrun_go_on(
    monkeypatch: pytest.MonkeyPatch, env: dict[str, str]
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    refuse_separate_tasks()
