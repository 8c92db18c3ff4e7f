"""Compute the metrics of each logged step, and send them to the progress line and the sinks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter, time
from typing import TYPE_CHECKING, Any

from torchtitan.components.metric_sinks import Group, Sink, build_sinks
from torchtitan.components.progress import PlainProgress, build_progress
from torchtitan.components.rank_metrics import own_number
from torchtitan.config.batch import batch_sizes
from torchtitan.errors import ConfigError, os_errors_as, refuse_incomplete
from torchtitan.runtime.terminal import leave_closed_terminal
from torchtitan.runtime.world import rank
from torchtitan.tools.hardware import peak_memory, this_device_peak_flops
from torchtitan.tools.logging import logger
from torchtitan.tools.text import few

if TYPE_CHECKING:
    from torchtitan.config import JobConfig
    from torchtitan.distributed.parallel_dims import ParallelDims
    from torchtitan.protocols.model import BaseModelArgs


class MetricsProcessor:
    """Turns the trainer's figures of a step into the logged values.

    Call `start` just before the first step, and again when the run goes back to an earlier one;
    `log` after each logged step; `log_validation` after each validation; and `close` at the end,
    also when the run fails (it restores the terminal). Time inside `pause` does not count in the
    throughput. Rank 0 shows and writes the values; on other ranks calls do nothing. A replacement
    (`TrainSpec.build_metrics_processor_fn`) has the same methods and `flops_per_token`.

    Raises:
        ConfigError: W&B is enabled, but is not installed or refuses to start.
        OutageError: W&B cannot be reached.
    """

    def __init__(
        self, job_config: JobConfig, parallel_dims: ParallelDims, model_args: BaseModelArgs
    ) -> None:
        training, fault_tolerance = job_config.training, job_config.fault_tolerance
        self._total_steps = training.steps
        self._devices = parallel_dims.world_size  # of one replica group
        self._replica_groups = fault_tolerance.group_size if fault_tolerance.enable else 1
        _, self.flops_per_token = model_args.get_nparams_and_flops(training.seq_len)
        # The peak is for bf16, so it is no reference for a run in fp32.
        in_bf16 = training.mixed_precision_param == "bfloat16"
        self._peak_flops = this_device_peak_flops() if in_bf16 else None
        # Up to a step, in any unit: the steps grow in a ramp.
        self._work_through = batch_sizes(job_config, 1).through
        self._progress: PlainProgress | None = None
        self._sinks: list[Sink] = []
        if rank() == 0:
            self._progress = build_progress(job_config.metrics.progress, training.steps)
            self._sinks = build_sinks(job_config)
        self._started = self._logged = perf_counter()
        self._started_at: int | None = None  # by the clock; None: not yet
        self._paused_seconds = 0.0  # since the last logged step
        self._first_logged: tuple[int, float] | None = None  # step and time

    def start(self, step: int = 0) -> None:
        """Begin a run after `step` (0, or the step of its own checkpoint that it resumes from).

        Drops values of later steps that an earlier attempt left in the dump folder, so that each
        file has one line per step.

        Raises:
            ConfigError: at the first call, `job.dump_folder` is not writable.
            OutageError: the same, but perhaps only for now.
        """
        if self._started_at is None:
            with os_errors_as(ConfigError, "job.dump_folder: cannot write metrics"):
                for sink in self._sinks:
                    sink.start(step)
            self._started, self._started_at = perf_counter(), int(time())
        else:
            for sink in self._sinks:
                sink.go_back(step)
        self._logged = perf_counter()
        self._paused_seconds = 0.0
        self._first_logged = None

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the enclosed work from the throughput: validation, checkpoints, traces."""
        begin = perf_counter()
        try:
            yield
        finally:
            self._paused_seconds += perf_counter() - begin

    def log(
        self,
        step: int,
        *,
        loss: float,
        grad_norm: float,
        lr: float,
        ntokens_since_last: int,
        tokens_seen: int,
        data_wait_seconds: float,
        max_loss: float | None = None,
        extra: dict[str, float] | None = None,
    ) -> None:
        """Log a step.

        Args:
            loss: mean over the tokens of the step, on all ranks.
            grad_norm: global norm of the gradients before clipping.
            ntokens_since_last: tokens processed by all ranks since the last logged step.
            tokens_seen: tokens trained on since step 0.
            data_wait_seconds: time this rank waited for data since the last logged step.
            max_loss: largest loss of a step since the last logged one.
            extra: further values, by their names in `metrics.jsonl`.
        """
        if self._progress is None:
            return
        now = perf_counter()
        seconds = max(now - self._logged - self._paused_seconds, 1e-9)
        tokens_per_second = ntokens_since_last / seconds
        # Each replica group logs the tokens of all participating groups, so divide by the devices
        # of all of them.
        groups = (extra or {}).get("replica_groups", self._replica_groups)
        tokens_per_device = tokens_per_second / (self._devices * groups)
        flops = tokens_per_device * self.flops_per_token
        memory = peak_memory()
        values: dict[str, Any] = {
            "loss": loss,
            "max_loss": max_loss,
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens_per_second": tokens_per_second,
            "tokens_per_second_per_device": tokens_per_device,
            "tflops_per_second_per_device": flops / 1e12,
            "mfu": flops / self._peak_flops if self._peak_flops else None,
            "peak_memory_bytes": memory.bytes,
            "peak_memory_reserved_percent": memory.reserved_percent,
            "data_wait_seconds": data_wait_seconds,
            "elapsed_seconds": now - self._started,
            "started_at": self._started_at,
            "tokens_seen": tokens_seen,
        }
        values = joined_metrics(values, extra or {})
        values = {key: value for key, value in values.items() if value is not None}
        try:
            self._progress.update(step, values, self._eta_seconds(step, now))
        except OSError:  # the terminal is closed; its signal may arrive later
            leave_closed_terminal()
        self._write(step, values, "train")
        # Do not count the time spent here either.
        self._logged = perf_counter()
        self._paused_seconds = 0.0

    def log_validation(
        self, step: int, loss: float, extra: Mapping[str, float] | None = None
    ) -> None:
        """Log the loss on held-out data after `step`, the mean over all tokens of all ranks.

        Args:
            extra: further values, by their names in `validation.jsonl`.
        """
        if self._progress is None:
            return
        self._progress.validation(loss)
        own = {name: own_number("a validator", name, v) for name, v in (extra or {}).items()}
        values = joined_metrics({"loss": loss}, own)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        logger.info("validation after step %d: %s", step, shown)
        self._write(step, values, "validation")

    def show_checkpoint(self, step: int | None) -> None:
        """Show the step of the last complete checkpoint; None: there is none yet."""
        if self._progress is not None and step is not None:
            self._progress.checkpoint(step)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.close()
        for sink in self._sinks:
            sink.close()
        self._sinks = []

    def _eta_seconds(self, step: int, now: float) -> float | None:
        """Estimate from the mean pace, pauses included, since the first logged step.

        The steps up to then do not count, as they may compile.
        """
        if self._first_logged is None:
            self._first_logged = (step, now)
        first_step, first_time = self._first_logged
        if step == first_step:
            return None
        begun, done, total = map(self._work_through, (first_step, step, self._total_steps))
        return (now - first_time) / (done - begun) * (total - done)

    def _write(self, step: int, values: dict[str, Any], group: Group) -> None:
        for sink in self._sinks:
            sink.write(step, values, group)


build_metrics_processor = MetricsProcessor
"""The default of `TrainSpec.build_metrics_processor_fn`."""


def joined_metrics(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics of all parts of a run.

    Raises:
        ConfigError: an author's metric has the name of another, or is `step`.
    """
    names = ["step", *(name for part in parts for name in part)]
    if taken := [name for name, count in Counter(names).items() if count > 1]:
        raise ConfigError(
            f"metrics() of a data loader, a loss or a validator returns {few(taken)}, which the "
            "run itself or another of them logs: choose another name"
        )
    return {name: value for part in parts for name, value in part.items()}


def check_metrics_processor(processor: Any, job_config: JobConfig) -> None:
    """Raise `ConfigError` if an author's object lacks a name of `MetricsProcessor`."""
    names = ("start", "pause", "log", "log_validation", "show_checkpoint", "close")
    missing = [name for name in names if not callable(getattr(processor, name, None))]
    if not isinstance(getattr(processor, "flops_per_token", None), int | float):
        missing.append("flops_per_token")
    maker = f"build_metrics_processor_fn of {job_config.model.name}"
    needed = "; see torchtitan.components.metrics.MetricsProcessor"
    refuse_incomplete(processor, maker, missing, needed)
