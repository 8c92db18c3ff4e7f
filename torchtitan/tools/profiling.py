"""Writes `torch.profiler` traces and CUDA memory snapshots to `job.dump_folder`/profile/step-N."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile

from torchtitan.errors import ConfigError
from torchtitan.runtime.device import device_type
from torchtitan.tools.logging import logger

if TYPE_CHECKING:
    from torchtitan.config import JobConfig

# Allocations and frees in a snapshot: a few steps of a large model, about 100 MB.
_MEMORY_EVENTS = 100_000
_MOST_RANKS = 64
"""Ranks that write, unless `profiling.ranks` chooses: of 10,000, each time would be 1 TB."""


def check_profiling(job_config: JobConfig) -> None:
    """Raise `ConfigError` if this machine does not support the settings of `[profiling]`."""
    if job_config.profiling.enable_memory_snapshot and device_type() != "cuda":
        raise ConfigError(
            "profiling.enable_memory_snapshot = true: snapshots show CUDA memory, but this "
            "machine has no CUDA device. Set it to false; enable_profiling also works on a CPU"
        )


class Profiler:
    """Profiles the steps after `start_step` as configured in `[profiling]`, or does nothing.

    For each step N divisible by `profile_freq`, each of the `ranks` writes to step-N:
    rank-R.json.gz (Chrome trace format) of the `profiler_active` steps that end with N, and
    memory-rank-R.pickle. If memory runs out, any rank writes out-of-memory-rank-R.pickle of the
    step that failed. The last two open at https://pytorch.org/memory_viz.
    """

    def __init__(self, job_config: JobConfig, rank: int, start_step: int) -> None:
        config = job_config.profiling
        self._folder = Path(job_config.job.dump_folder, "profile")
        self._freq, self._rank = config.profile_freq, rank
        self._active, self._warmup = config.profiler_active, config.profiler_warmup
        self._chosen = rank in (config.ranks or range(_MOST_RANKS))
        self._memory = config.enable_memory_snapshot
        self._finished_step = start_step
        self._action = ProfilerAction.NONE
        self._closing = False
        self._trace: profile | None = None
        if config.enable_profiling and self._chosen:
            activities = [ProfilerActivity.CPU]
            if device_type() == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._trace = profile(
                activities=activities,
                schedule=self._schedule,
                on_trace_ready=self._write_trace,
                record_shapes=True,
            )

    def __enter__(self) -> Profiler:
        if self._trace is not None:
            self._trace.start()
        if self._memory:
            torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *exc_info: object) -> None:
        self._closing = True
        if self._memory:
            if exc_type is not None and issubclass(exc_type, torch.OutOfMemoryError):
                self._write_memory(self._finished_step + 1, "out-of-memory")
            torch.cuda.memory._record_memory_history(enabled=None)
        if self._trace is not None:
            self._trace.stop()

    def step(self, step: int) -> None:
        """Call this after training step `step`."""
        self._finished_step = step
        if self._trace is not None:
            with warnings.catch_warnings():
                # Each trace begins anew, also after a rollback, and torch warns about that.
                expected = ".*(Profiler clears events|Incorrect schedule)"
                warnings.filterwarnings("ignore", message=expected)
                self._trace.step()
        if self._memory and self._chosen and step % self._freq == 0:
            self._write_memory(step, "memory")

    def _schedule(self, _: int) -> ProfilerAction:
        """Choose the next step's action, not by PyTorch's count: a rollback repeats steps."""
        ahead = -(self._finished_step + 1) % self._freq
        before, self._action = self._action, ProfilerAction.NONE
        if ahead == 0:
            self._action = ProfilerAction.RECORD_AND_SAVE
        elif ahead < self._active:
            self._action = ProfilerAction.RECORD
        # From RECORD to WARMUP, as after a rollback, PyTorch crashes (2.13).
        elif ahead < self._active + self._warmup and before != ProfilerAction.RECORD:
            self._action = ProfilerAction.WARMUP
        return self._action

    def _write_trace(self, trace: profile) -> None:
        if self._closing:  # the run ends before the step that should have been recorded
            return
        path = self._folder / f"step-{self._finished_step}" / f"rank-{self._rank}.json.gz"
        first = f"{self._active} steps up to " if self._active > 1 else ""
        what = f"profiler trace of {first}step {self._finished_step}"
        _try_to_write(what, path, trace.export_chrome_trace)

    def _write_memory(self, step: int, name: str) -> None:
        path = self._folder / f"step-{step}" / f"{name}-rank-{self._rank}.pickle"
        _try_to_write(f"memory snapshot of step {step}", path, torch.cuda.memory._dump_snapshot)


def _try_to_write(what: str, path: Path, write: Callable[[str], object]) -> None:
    """Write a file; a full disk costs this file, not the run, nor the error that ends the run."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(str(path))
    except OSError as error:
        logger.warning("%s: cannot write %s: %s", what, path, error)
        with suppress(OSError):
            path.unlink(missing_ok=True)  # remove the incomplete file
        return
    logger.info("%s: %s", what, path)
