"""Where the logged values go: JSON lines, TensorBoard, Weights & Biases."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torchtitan.components.checkpoint.folder import (
    checkpoint_root,
    is_resumable,
    list_checkpoints,
)
from torchtitan.errors import ConfigError, TitanError, outage_or
from torchtitan.tools.run_folder import METRICS_FILE, VALIDATION_FILE
from torchtitan.tools.secrets import hide_secrets

if TYPE_CHECKING:
    from torchtitan.config import JobConfig

logger = logging.getLogger("torchtitan")

Group = Literal["train", "validation"]

_MOST_LINES_KEPT = 10_000
"""While a disk is full or gone: as many lines wait in memory."""
_SECONDS_TO_NEXT_EVENT_FILE = 300.0
"""Each try leaves an empty file, where a full disk still takes names."""


class Sink(Protocol):
    """Receives the values of each logged step; NaN, infinities and None are possible values.

    Only `start` raises, and only the first time: metrics are no reason to lose a run that goes.
    """

    def start(self, step: int) -> None:
        """Called before the first write, and when the run goes back to the end of `step`; forget
        what was written of later steps.

        Raises:
            OSError: at the first call: what it needs cannot be written.
        """

    def write(self, step: int, values: dict[str, Any], group: Group) -> None: ...

    def close(self) -> None: ...


def build_sinks(job_config: JobConfig) -> list[Sink]:
    """The sinks that `[metrics]` asks for; JSON lines always.

    A run that has checkpoints already goes on without W&B where that does not start: it would be
    a pity about all the processes that are to be started again.

    Raises:
        ConfigError: W&B is asked for, and it is not installed or refuses to start.
        OutageError: it cannot be reached.
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
            logger.warning("%s. The run goes on without it", error)
    return sinks


def _resumes(job_config: JobConfig) -> bool:
    if not job_config.checkpoint.enable:
        return False
    return any(map(is_resumable, reversed(list_checkpoints(checkpoint_root(job_config)))))


class JsonLinesSink:
    """`metrics.jsonl` and `validation.jsonl`: a JSON object a step, null for what is not finite.

    What cannot be written now is written once that goes again.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[Group, _Lines] = {
            "train": _Lines(folder / METRICS_FILE),
            "validation": _Lines(folder / VALIDATION_FILE),
        }
        self._started = False

    def start(self, step: int) -> None:
        for file in self._files.values():
            if self._started:
                file.go_back(step)
                continue
            path = file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                if step == 0:
                    _set_aside(path)
                else:
                    _keep_steps_up_to(step, path)
        self._started = True

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
    """A file that lines are added to, also where it cannot be written for a while."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: deque[tuple[int, str]] = deque(maxlen=_MOST_LINES_KEPT)
        self._whole: int | None = None
        """Bytes of whole lines, if the file may end with a part of one."""
        self._last_step: int | None = None
        """The run went back to this step, and the file may still have later ones."""
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
                    "step %d: cannot write %s: %s. It is tried again at each step that is logged",
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
            logger.info(
                "%s can be written again, and has the %d lines that waited", self.path, lines
            )
        self._waiting.clear()


def _set_aside(path: Path) -> None:
    """Keep what an earlier run has left, which this one does not go on from."""
    if path.stat().st_size == 0:
        return
    names = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    kept = next(name for name in names if not name.exists())
    path.rename(kept)
    logger.warning(
        "%s is of an earlier start, which this one does not go on from, and was kept as %s. If "
        "that was another run, job.dump_folder gives each a folder of its own",
        path,
        kept.name,
    )


def _keep_steps_up_to(step: int, path: Path) -> None:
    """Drop the lines of later steps, and those that are damaged, in one atomic change."""
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError):
            continue
    rewritten = path.with_name(path.name + ".tmp")
    rewritten.write_bytes(b"".join(kept))
    rewritten.replace(path)


class TensorBoardSink:
    """TensorBoard events, tagged `train/loss`, `validation/loss` and so on.

    After an error of the disk, a new event file is tried from time to time; what was logged in
    between is missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None  # a SummaryWriter
        self._purge_step: int | None = None
        """For the next event file: steps from this one on in earlier files do not count."""
        self._next_try = -math.inf
        self._started = False

    def start(self, step: int) -> None:
        self.close()
        purge_step = step + 1
        if self._purge_step is not None:  # none could be written since the run last went back
            purge_step = min(purge_step, self._purge_step)
        self._purge_step = purge_step
        if self._started:
            self._try(step, self._open)
        else:
            self._open()
        self._started = True

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
                "step %d: cannot write for TensorBoard: %s. A new file is tried in %.0f min",
                *(step, error, _SECONDS_TO_NEXT_EVENT_FILE / 60),
            )
            self._writer = None  # its thread has ended with the error
            self._next_try = monotonic() + _SECONDS_TO_NEXT_EVENT_FILE


class WandbSink:
    """A Weights & Biases run. Its project is `WANDB_PROJECT`, its name `job.description`.

    Its id is kept in the dump folder, so that a run that resumes goes on with it. Other settings
    come from W&B's own environment variables (`WANDB_MODE`, `WANDB_RUN_ID`, ...).
    """

    def __init__(self, job_config: JobConfig) -> None:
        self._lost = False
        folder = Path(job_config.job.dump_folder)
        folder.mkdir(parents=True, exist_ok=True)
        id_file = folder / "wandb_run_id"
        kept_id = _kept_id(id_file, job_config)
        try:
            import wandb  # `validate` has seen that it is installed

            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "torchtitan"),
                name=job_config.job.description,
                id=kept_id,  # None: that of WANDB_RUN_ID, or a new one
                resume=None if os.environ.get("WANDB_RESUME") else "allow",
                dir=str(folder),
                config=json.loads(hide_secrets(json.dumps(asdict(job_config)))),
            )
            # A key of our own for the x axis: W&B drops values of a step of its own that it has
            # been at before, and so those after the run went back.
            self._run.define_metric("step", hidden=True)
            for group in ("train", "validation"):
                self._run.define_metric(f"{group}/*", step_metric="step")
        except Exception as error:
            problem = (
                f"metrics.enable_wandb = true: wandb does not start: {error}. "
                "Run `wandb login`, or set WANDB_MODE=offline"
            )
            if kept_id:
                problem += f". Without the file {id_file}, a new run begins there"
            raise outage_or(ConfigError, problem, error) from error
        try:
            id_file.write_text(f"{self._run.id}\n")
        except OSError as error:
            logger.warning("%s: cannot write: %s. A restart will be another run", id_file, error)

    def start(self, step: int) -> None:
        """W&B keeps what it has: steps that are done again appear twice."""

    def write(self, step: int, values: dict[str, Any], group: Group) -> None:
        if self._lost:
            return
        named = {f"{group}/{key}": value for key, value in values.items() if value is not None}
        try:
            self._run.log(named | {"step": step})
        except Exception as error:  # W&B's own, such as of its process that has ended
            logger.warning("step %d: W&B stops: %s. The run goes on without it", step, error)
            self._lost = True

    def close(self) -> None:
        try:
            self._run.finish()
        except Exception as error:
            logger.warning("W&B may lack the last values: %s", error)


def _kept_id(file: Path, job_config: JobConfig) -> str | None:
    """W&B's id of the run that this process goes on with, if it is known and no other is wanted."""
    if os.environ.get("WANDB_RUN_ID"):
        return None
    try:
        kept_id = file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    # Of a run that begins anew in the folder, the curve is another one.
    return kept_id if kept_id and _resumes(job_config) else None
