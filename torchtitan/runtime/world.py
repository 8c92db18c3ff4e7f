"""This process's place among those of the job, by the environment variables of torchrun."""

from __future__ import annotations

import os

from torchtitan.errors import ConfigError


def world_size() -> int:
    """Return the number of processes by torchrun's environment, known before they connect."""
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    """Return the number of this process, known before the processes connect."""
    return _number("RANK", 0)


def local_rank() -> int:
    """Return the number of this process among those of its host."""
    return _number("LOCAL_RANK", 0)


def local_world_size() -> int:
    """Return the number of processes on this host."""
    return _number("LOCAL_WORLD_SIZE", 1)


def has_agent_store() -> bool:
    """Return whether torchrun's agent holds a store for the ranks, at MASTER_ADDR."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        problem = "not a number. torchrun sets it; without torchrun, unset it"
        raise ConfigError(f"the environment variable {name} is {value!r}, {problem}")
    return int(value)


def check_environment() -> None:
    """Raise `ConfigError` if torchrun's variables are set only in part, as by another job."""
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if "RANK" in missing and world_size() == 1:
        return
    if missing:
        known = ", ".join(f"{n} is {os.environ[n]!r}" for n in needed[:2] if n in os.environ)
        raise ConfigError(
            f"the environment variable {known}, but {' and '.join(missing)} are not set, so this "
            "process cannot find the others. Start all with torchrun; for a single process, unset "
            f"{' and '.join(name for name in needed[:2] if name in os.environ)}"
        )
    _number("MASTER_PORT", 0)


def refuse_separate_tasks() -> None:
    """Raise `ConfigError` for one of several processes that srun has started without torchrun.

    Each would be a run of its own, and all would write into one folder. Other Slurm variables are
    set in a batch script, too, which is one process.
    """
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" not in os.environ and tasks.isdecimal() and int(tasks) > 1:
        raise ConfigError(
            f"srun has started {tasks} processes (SLURM_STEP_NUM_TASKS) that do not know of each "
            "other: each would train alone, and all would write to one job.dump_folder. Let srun "
            "start one torchrun per host, as the script of `torchtitan launch --slurm` does. If "
            "they should be separate runs, with a job.dump_folder each, unset SLURM_STEP_NUM_TASKS"
        )
