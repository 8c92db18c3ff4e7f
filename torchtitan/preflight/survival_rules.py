"""Check the settings that keep a run alive: checkpoints, guard, hang watch, replica groups."""

from __future__ import annotations

import importlib.util
import os

from torchtitan.config.batch import batches_to_skip
from torchtitan.config.job_config import JobConfig
from torchtitan.config.load import fail
from torchtitan.runtime import device


def check_survival(job_config: JobConfig) -> None:
    """Raise `ConfigError` if the settings that keep a run alive do not fit the rest."""
    _check_checkpoints(job_config)
    _check_guard(job_config)
    _check_watch(job_config)
    _check_fault_tolerance(job_config)


def _check_checkpoints(job_config: JobConfig) -> None:
    config = job_config.checkpoint
    if config.keep_every % config.interval:
        below = config.keep_every - config.keep_every % config.interval
        problem = (
            f"must be a multiple of checkpoint.interval ({config.interval}), since only those "
            f"steps are saved. Nearest: {below or config.interval}"
        )
        fail(job_config, "checkpoint.keep_every", problem)
    if (first := min(config.keep_steps, default=1)) < 1:
        problem = (
            f"has {first}, but the first step is 1. Initial weights depend on debug.seed alone"
        )
        fail(job_config, "checkpoint.keep_steps", problem)


def _check_guard(job_config: JobConfig) -> None:
    training = job_config.training
    for name in ("on_nonfinite", "on_spike"):
        if getattr(training, name) == "rollback" and not job_config.checkpoint.enable:
            problem = "there is no checkpoint to roll back to, since checkpoint.enable is false"
            fail(job_config, f"training.{name}", problem)
    batches_to_skip(job_config)
    may_differ = device.device_type() == "cuda" and not job_config.debug.deterministic
    if training.replay_freq and may_differ:
        problem = "CUDA kernels may give different bits each time. Set debug.deterministic = true"
        fail(job_config, "training.replay_freq", problem)


def _check_watch(job_config: JobConfig) -> None:
    comm = job_config.comm
    if job_config.metrics.straggler_freq:
        key = "metrics.straggler_freq"
        if job_config.compile.enable:
            fail(job_config, key, "collectives of compiled models cannot be timed. Use 0")
        if job_config.parallelism.pipeline_parallel_degree > 1:
            fail(
                job_config,
                key,
                "not supported with pipeline parallelism, whose stages wait for each other. Use 0",
            )
    if comm.hang_seconds >= comm.timeout_seconds:
        problem = (
            f"must be less than comm.timeout_seconds ({comm.timeout_seconds}), which ends the run"
        )
        fail(job_config, "comm.hang_seconds", problem)


def _check_fault_tolerance(job_config: JobConfig) -> None:
    config = job_config.fault_tolerance
    if not config.enable:
        return
    if importlib.util.find_spec("torchft") is None:
        problem = "torchft is not installed: pip install 'torchtitan[torchft]' (or torchft-nightly)"
        fail(job_config, "fault_tolerance.enable", problem)
    if not os.environ.get("TORCHFT_LIGHTHOUSE"):
        problem = (
            "needs the address of the lighthouse in the environment variable TORCHFT_LIGHTHOUSE, "
            "such as http://HOST:29510. Start one: torchft_lighthouse --min_replicas 1"
        )
        fail(job_config, "fault_tolerance.enable", problem)
    if "RANK" not in os.environ:
        problem = "needs torchrun, even for one process: the ranks meet at its store"
        fail(job_config, "fault_tolerance.enable", problem)
    check_replica_groups(job_config)


def check_replica_groups(job_config: JobConfig) -> None:
    """Check the rules that do not depend on the machine. Raises `ConfigError`."""
    config = job_config.fault_tolerance
    if config.replica_id >= config.group_size:
        problem = f"must be less than fault_tolerance.group_size ({config.group_size})"
        fail(job_config, "fault_tolerance.replica_id", problem)
    if config.min_replica_size > config.group_size:
        problem = f"must be at most fault_tolerance.group_size ({config.group_size})"
        fail(job_config, "fault_tolerance.min_replica_size", problem)
    for name in ("on_nonfinite", "on_spike"):
        if getattr(job_config.training, name) == "rollback":
            problem = "replica groups cannot roll back together. Use 'skip'"
            fail(job_config, f"training.{name}", problem)
