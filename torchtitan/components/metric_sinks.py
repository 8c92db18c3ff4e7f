"""Write the logged values to JSON lines, TensorBoard and Weights & Biases."""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any, Literal, Protocol

from torchtitan.components.checkpoint.folder import (
    checkpoint_root,
    is_resumable,
    list_checkpoints,
)
from torchtitan.components.run_folder import METRICS_FILE, VALIDATION_FILE
from torchtitan.config import JobConfig
from torchtitan.errors import ConfigError, TitanError, outage_or
from torchtitan.tools.foreign_files import parse_json
from torchtitan.tools.logging import logger
from torchtitan.tools.secrets import hide_secrets

Group = Literal["train", "validation"]

_MOST_LINES_KEPT = 10_000
"""Maximum number of lines kept in memory while the disk is full or unavailable."""
_SECONDS_TO_NEXT_EVENT_FILE = 300.0
"""Delay between attempts, since each may leave an empty file even on a full disk."""


class Sink(Protocol):
    """Receives the values of each logged step, which may be NaN, infinite or None.

    Only `start` raises: metrics must not end a run in progress.
    """

    def start(self, step: int) -> None:
        """Forget what an earlier process wrote of steps after `step`. Called once, first.

        Raises:
            OSError: the sink cannot write its files.
        """

    def go_back(self, step: int) -> None:
        """Forget the values of steps after `step`: the run has gone back to its end."""

    def write(self, step: int, values: dict[str, Any], group: Group) -> None: ...

    def close(self) -> None: ...


def build_sinks(job_config: JobConfig) -> list[Sink]:
    """Return the sinks enabled in `[metrics]`, and always JSON lines.

    If W&B does not start, a run that already has checkpoints continues without it, rather than
    fail the restart of all processes.

    Raises:
        ConfigError: W&B is enabled, but is not installed or refuses to start.
        OutageError: W&B cannot be reached.
    """
    folder = Path(job_config.job.dump_folder)
    sinks: list[Sink] = [JsonLinesSink(folder)]
    if job_config.metrics.enable_tensorboard:
        sinks.append(TensorBoardSink(folder / job_config.metrics.save_tb_folder))
    if job_config.metrics.enable_wandb:
        try:
            sinks.append(WandbSink(job_config))
        except TitanError as error:
            if not _resumes(job_config):
                raise
            logger.warning("%s. The run continues without it", error)
    return sinks


def _resumes(job_config: JobConfig) -> bool:
    if not job_config.checkpoint.enable:
        return False
    return any(map(is_resumable, reversed(list_checkpoints(checkpoint_root(job_config)))))


class JsonLinesSink:
    """Writes `metrics.jsonl` and `validation.jsonl`: one JSON object per step.

    Non-finite values are written as null. Lines that cannot be written are kept and written later.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[Group, _Lines] = {
            "train": _Lines(folder / METRICS_FILE),
            "validation": _Lines(folder / VALIDATION_FILE),
        }

    def start(self, step: int) -> None:
        for path in (file.path for file in self._files.values()):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                continue
            if step == 0:
                _set_aside(path)
            else:
                _keep_steps_up_to(step, path)

    def go_back(self, step: int) -> None:
        for file in self._files.values():
            file.go_back(step)

    def write(self, step: int, values: dict[str, Any], group: Group) -> None:
        row = {"step": step} | {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        self._files[group].add(step, json.dumps(row, allow_nan=False) + "\n")

    def close(self) -> None:
        for file in self._files.values():
            file.close()


class _Lines:
    """Appends lines to a file, and keeps them while it cannot be written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: deque[tuple[int, str]] = deque(maxlen=_MOST_LINES_KEPT)
        self._whole: int | None = None
        """Size in bytes of the complete lines, if the file may end with a partial line."""
        self._last_step: int | None = None
        """Step that the run went back to, if the file may still have later ones."""
        self._failing = False

    def add(self, step: int, line: str) -> None:
        self._waiting.append((step, line))
        self._try_to_write(step)

    def go_back(self, step: int) -> None:
        """Drop the lines of later steps."""
        kept = [(of, line) for of, line in self._waiting if of <= step]
        self._waiting.clear()
        self._waiting.extend(kept)
        self._last_step = step if self._last_step is None else min(step, self._last_step)
        self._try_to_write(step)

    def close(self) -> None:
        try:
            self._write()
        except OSError as error:
            logger.warning("%s lacks %d lines: %s", self.path, len(self._waiting), error)

    def _try_to_write(self, step: int) -> None:
        try:
            self._write()
        except OSError as error:
            if not self._failing:
                logger.warning(
                    "step %d: cannot write %s: %s. Trying again at each logged step",
                    *(step, self.path, error),
                )
            self._failing = True
            return
        self._failing = False

    def _write(self) -> None:
        if self._whole is not None and self.path.exists():
            os.truncate(self.path, min(self._whole, self.path.stat().st_size))
        self._whole = None
        if self._last_step is not None:
            if self.path.exists():
                _keep_steps_up_to(self._last_step, self.path)
            self._last_step = None
        if not self._waiting:
            return
        text = "".join(line for _, line in self._waiting)
        with self.path.open("ab", buffering=0) as file:
            self._whole = file.seek(0, os.SEEK_END)
            data = text.encode()
            while data:
                data = data[file.write(data) :]
        self._whole = None
        if len(self._waiting) > 1:
            lines = len(self._waiting)
            logger.info("%s can be written again, including the %d pending lines", self.path, lines)
        self._waiting.clear()


def _set_aside(path: Path) -> None:
    """Rename the file of an earlier run that this run does not continue."""
    if path.stat().st_size == 0:
        return
    names = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    kept = next(name for name in names if not name.exists())
    path.rename(kept)
    logger.warning(
        "%s is from an earlier run that this run does not resume, and was renamed to %s. Give "
        "each run its own folder with job.dump_folder",
        path,
        kept.name,
    )


def _keep_steps_up_to(step: int, path: Path) -> None:
    """Drop lines of later steps and damaged lines, in one atomic change."""
    rewritten = path.with_name(path.name + ".tmp")
    with path.open("rb") as lines, rewritten.open("wb") as kept:
        for line in lines:
            try:
                if parse_json(line)["step"] <= step:
                    kept.write(line.rstrip(b"\n") + b"\n")
            except (ValueError, KeyError, TypeError):
                continue
    rewritten.replace(path)


class TensorBoardSink:
    """Writes TensorBoard events, tagged `train/loss`, `validation/loss` and so on.

    After a disk error, it retries with a new event file from time to time; values logged in between
    are missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None  # a SummaryWriter
        self._purge_step: int | None = None
        """For the next event file: steps from this one on in earlier files are discarded."""
        self._next_try = -math.inf

    def start(self, step: int) -> None:
        self._purge_step = step + 1
        self._open()

    def go_back(self, step: int) -> None:
        self.close()
        purge_step = step + 1
        if self._purge_step is not None:  # nothing was written since the start or the last return
            purge_step = min(purge_step, self._purge_step)
        self._purge_step = purge_step
        self._try(step, self._open)

    def write(self, step: int, values: dict[str, Any], group: Group) -> None:
        def add() -> None:
            if self._writer is None:
                self._open()
            for key, value in values.items():
                if value is not None:
                    self._writer.add_scalar(f"{group}/{key}", value, step)
            self._writer.flush()
            self._purge_step = None

        self._try(step, add)

    def close(self) -> None:
        if self._writer is None:
            return
        try:
            self._writer.close()
        except OSError as error:
            logger.warning("TensorBoard's file may lack its last values: %s", error)
        self._writer = None

    def _open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self._writer = SummaryWriter(str(self._folder), purge_step=self._purge_step)

    def _try(self, step: int, write: Callable[[], None]) -> None:
        if self._writer is None and monotonic() < self._next_try:
            return
        try:
            write()
        except OSError as error:
            logger.warning(
                "step %d: cannot write for TensorBoard: %s. Trying a new file in %.0f min",
                *(step, error, _SECONDS_TO_NEXT_EVENT_FILE / 60),
            )
            self._writer = None  # its thread has ended with the error
            self._next_try = monotonic() + _SECONDS_TO_NEXT_EVENT_FILE


class WandbSink:
    """Logs to a Weights & Biases run in project `WANDB_PROJECT`, named `job.description`.

    The run's id is kept in the dump folder, so that a resumed run continues it. Other settings come
    from W&B's own environment variables (`WANDB_MODE`, `WANDB_RUN_ID`, ...).
    """

    def __init__(self, job_config: JobConfig) -> None:
        self._lost = False
        folder = Path(job_config.job.dump_folder)
        folder.mkdir(parents=True, exist_ok=True)
        id_file = folder / "wandb_run_id"
        kept_id = _kept_id(id_file, job_config)
        try:
            import wandb  # `validate` has checked that it is installed

            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "torchtitan"),
                name=job_config.job.description,
                id=kept_id,  # None: WANDB_RUN_ID, or a new id
                resume=None if os.environ.get("WANDB_RESUME") else "allow",
                dir=str(folder),
                config=json.loads(hide_secrets(json.dumps(asdict(job_config)))),
            )
            # A custom x axis: W&B drops values whose built-in step it has already passed, and so
            # would drop those logged after the run went back.
            self._run.define_metric("step", hidden=True)
            for group in ("train", "validation"):
                self._run.define_metric(f"{group}/*", step_metric="step")
        except Exception as error:
            problem = (
                f"metrics.enable_wandb = true: wandb cannot start: {error}. Run `wandb login`, or "
                "set WANDB_MODE=offline"
            )
            if kept_id:
                problem += f". To begin a new run there, delete the file {id_file}"
            raise outage_or(ConfigError, problem, error) from error
        try:
            id_file.write_text(f"{self._run.id}\n")
        except OSError as error:
            logger.warning(
                "%s: cannot write: %s. A restart will begin a new W&B run", id_file, error
            )

    def start(self, step: int) -> None:
        """Do nothing: W&B keeps its values, so repeated steps appear twice."""

    def go_back(self, step: int) -> None:
        """Do nothing, as `start`."""

    def write(self, step: int, values: dict[str, Any], group: Group) -> None:
        if self._lost:
            return
        named = {f"{group}/{key}": value for key, value in values.items() if value is not None}
        try:
            self._run.log(named | {"step": step})
        except Exception as error:  # W&B's own types, for example if its process has ended
            logger.warning("step %d: W&B stopped: %s. The run continues without it", step, error)
            self._lost = True

    def close(self) -> None:
        failed = sys.exc_info()[0] is not None  # by the error for which the trainer closes
        try:
            self._run.finish(exit_code=int(failed))
        except Exception as error:
            logger.warning("W&B may lack the last values: %s", error)


def _kept_id(file: Path, job_config: JobConfig) -> str | None:
    """Return the W&B id of the run to continue; None if unknown or WANDB_RUN_ID is set."""
    if os.environ.get("WANDB_RUN_ID"):
        return None
    try:
        kept_id = file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    # A run that starts over in this folder gets a new curve.
    return kept_id if kept_id and _resumes(job_config) else None
