"""Processes that know of each other in part are refused, as those that srun starts alone."""

from __future__ import annotations

import pytest

from torchtitan.errors import ConfigError
from torchtitan.runtime.process_group import init_distributed
from torchtitan.runtime.world import rank, refuse_separate_tasks, world_size
from torchtitan.train import main


@pytest.fixture(autouse=True)
def outside_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS")
    for name in names:
        monkeypatch.delenv(name, raising=False)


def test_several_tasks_without_torchrun_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(ConfigError, match=r"srun has started 8 .*one torchrun per host"):
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


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is '2', but RANK and MASTER_ADDR and MASTER_PORT are"),
        ({"RANK": "0"}, "RANK is '0', but WORLD_SIZE and MASTER_ADDR and MASTER_PORT are not set"),
        (
            {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "abc"},
            "MASTER_PORT is 'abc', not a number",
        ),
    ],
)
def test_variables_of_torchrun_that_are_there_in_part(
    monkeypatch: pytest.MonkeyPatch, env: dict[str, str], message: str
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        init_distributed(60)


@pytest.mark.parametrize(("name", "read"), [("RANK", rank), ("WORLD_SIZE", world_size)])
def test_a_number_that_is_none(monkeypatch: pytest.MonkeyPatch, name, read) -> None:
    monkeypatch.setenv(name, "two")
    with pytest.raises(
        ConfigError, match=f"the environment variable {name} is 'two', not a number"
    ):
        read()
