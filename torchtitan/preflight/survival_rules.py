"""Check the settings that keep a run alive: checkpoints, guard, hang watch, replica groups."""

from __future__ import annotations

import importlib.util
import os
import re

from torchtitan.config.batch import batches_to_skip
from torchtitan.config.job_config import JobConfig
from torchtitan.preflight.problems import Problems
from torchtitan.runtime import device


def survival_problems(job_config: JobConfig) -> Problems:
    """Yield how the settings that keep a run alive do not fit the rest."""
    yield from _checkpoints(job_config)
    yield from _guard(job_config)
    yield from _watch(job_config)
    yield from _fault_tolerance(job_config)


def _checkpoints(job_config: JobConfig) -> Problems:
    config = job_config.checkpoint
    if config.keep_every % config.interval:
        below = config.keep_every - config.keep_every % config.interval
        yield (
            "checkpoint.keep_every",
            f"must be a multiple of checkpoint.interval ({config.interval}), since only those "
            f"steps are saved. Nearest: {below or config.interval}",
        )
    if (first := min(config.keep_steps, default=1)) < 1:
        yield (
            "checkpoint.keep_steps",
            f"has {first}, but the first step is 1. Initial weights depend on debug.seed alone",
        )


def _guard(job_config: JobConfig) -> Problems:
    for key in _rollbacks(job_config):
        if not job_config.checkpoint.enable:
            yield key, "there is no checkpoint to roll back to, since checkpoint.enable is false"
    batches_to_skip(job_config)
    may_differ = device.device_type() == "cuda" and not job_config.debug.deterministic
    if job_config.training.replay_freq and may_differ:
        problem = "CUDA kernels may give different bits each time. Set debug.deterministic = true"
        yield "training.replay_freq", problem


def _rollbacks(job_config: JobConfig) -> list[str]:
    """Return the keys that ask for rollbacks."""
    names = ("on_nonfinite", "on_spike")
    return [f"training.{n}" for n in names if getattr(job_config.training, n) == "rollback"]


def _watch(job_config: JobConfig) -> Problems:
    comm = job_config.comm
    if job_config.metrics.straggler_freq:
        key = "metrics.straggler_freq"
        if job_config.compile.enable:
            yield key, "collectives of compiled models cannot be timed. Use 0"
        if job_config.parallelism.pipeline_parallel_degree > 1:
            problem = "not supported with pipeline parallelism, whose stages wait for each other"
            yield key, f"{problem}. Use 0"
    if comm.hang_seconds >= comm.timeout_seconds:
        limit = f"comm.timeout_seconds ({comm.timeout_seconds})"
        yield "comm.hang_seconds", f"must be less than {limit}, which ends the run"


def _fault_tolerance(job_config: JobConfig) -> Problems:
    if not job_config.fault_tolerance.enable:
        if job_config.fault_tolerance.semi_sync_method != "none":
            yield "fault_tolerance.semi_sync_method", "needs fault_tolerance.enable = true"
        return
    key = "fault_tolerance.enable"
    if importlib.util.find_spec("torchft") is None:
        yield (
            key,
            "torchft is not installed: pip install 'torchtitan[torchft]' (or torchft-nightly)",
        )
    lighthouse = os.environ.get("TORCHFT_LIGHTHOUSE", "")
    if not lighthouse.startswith(("http://", "https://")):
        shown = f" (it is {lighthouse!r})" if lighthouse else ""
        yield (
            key,
            "needs the address of the lighthouse in the environment variable TORCHFT_LIGHTHOUSE, "
            f"such as http://HOST:29510{shown}. Start one: torchft_lighthouse --min_replicas 1",
        )
    if "RANK" not in os.environ:
        yield key, "needs torchrun, even for one process: the ranks meet at its store"
    yield from replica_group_problems(job_config)


def replica_group_problems(job_config: JobConfig) -> Problems:
    """Yield what does not depend on the machine."""
    config = job_config.fault_tolerance
    if config.semi_sync_method != "none" and config.sync_steps > job_config.training.steps:
        yield (
            "fault_tolerance.sync_steps",
            f"must be at most training.steps ({job_config.training.steps}), or the groups would "
            "meet only once, at the end",
        )
    size = f"fault_tolerance.group_size ({config.group_size})"
    if config.replica_id >= config.group_size:
        yield "fault_tolerance.replica_id", f"must be less than {size}"
    if config.min_replica_size > config.group_size:
        yield "fault_tolerance.min_replica_size", f"must be at most {size}"
    for key in _rollbacks(job_config):
        yield key, "replica groups cannot roll back together. Use 'skip'"
    checkpoint = job_config.checkpoint
    if not (checkpoint.initial_load_model_only or "dataloader" in checkpoint.exclude_from_loading):
        names = re.findall(r"replica-\d+", checkpoint.initial_load_path)
        if names and config.replica not in names:
            yield (
                "checkpoint.initial_load_path",
                f"its position in the data is not that of {config.replica}, which branches from a "
                "checkpoint of its own",
            )
