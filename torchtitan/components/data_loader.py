"""The data loader interface that the trainer needs, and its checks before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch

from torchtitan.config.load import fail
from torchtitan.errors import (
    ConfigError,
    DataError,
    OutageError,
    TitanError,
    disk_is_full,
    may_pass,
    refuse_incomplete,
)
from torchtitan.tools.logging import logger
from torchtitan.tools.text import first_line

if TYPE_CHECKING:
    from torchtitan.config import JobConfig
    from torchtitan.protocols.train_spec import TrainSpec

Batch = dict[str, torch.Tensor]

_METHODS = ("__next__", "close")
_STATE_METHODS = ("state_dict", "load_state_dict")


class DataLoader(Protocol):
    """Interface that `build_dataloader_fn` returns for one data rank.

    `torchtitan.data.DataLoader` implements it, including the optional methods
    `metrics() -> dict[str, float]`, `describe() -> dict` and `begin_at(step)`. `metrics` may
    return different keys on each rank: each logged value is the mean over the ranks that have it.
    `takes_ramp = True` if a step may take less than `global_batch_size`, as
    `training.batch_size_ramp` says, which `config.batch.batch_sizes` reads.
    """

    def __next__(self) -> Batch:
        """Return the next micro-batch; never stop.

        * `tokens`: the model's first argument, `[local_batch_size, seq_len]` int64 for texts, else
          `[local_batch_size, ...]` of any dtype;
        * `labels`: the targets of the loss, `[local_batch_size, seq_len, ...]`; int64 with
          `IGNORE_INDEX` at positions that do not count, or floating point with NaN there;
        * `positions`, `document_ids`: under `training.document_mask`,
          `[local_batch_size, seq_len]` int64;
        * any other key: passed to the model's `forward` by that name, `[local_batch_size, ...]`.
        """

    def close(self) -> None:
        """Stop background work. Called once, also after an error."""

    def state_dict(self) -> dict[str, Any]:
        """Return `{"rows": [rows of this rank, k] int64}`: the position after the last batch.

        A checkpoint concatenates the rows of all data ranks in order, and splits them again for
        another number of ranks. All ranks must have equally many rows, so use one row per sequence
        of the global batch. Called if a run saves checkpoints, or branches from one.
        """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state of `state_dict`.

        It also has the `seq_len` of the run that saved it, and the result of its `describe` as
        `described`.
        """


def has_own_loader(build_dataloader_fn: Any) -> bool:
    """Return whether the builder is not the library's, so that batches may not be texts."""
    while isinstance(build_dataloader_fn, partial):
        build_dataloader_fn = build_dataloader_fn.func
    return not str(getattr(build_dataloader_fn, "__module__", "")).startswith("torchtitan.data.")


def may_add_inputs(build_dataloader_fn: Any) -> bool:
    """Return whether batches may have more than texts: the builder is not the library's as it is.

    `partial(build_dataloader, later_tokens=2)` adds inputs.
    """
    return has_own_loader(build_dataloader_fn) or isinstance(build_dataloader_fn, partial)


def open_loader(spec: TrainSpec, job_config: JobConfig) -> Any:
    """Return the loader of a job on one process."""
    return spec.build_dataloader_fn(job_config, spec.tokenizer(job_config), 0, 1)


def why_no_batch(error: Exception) -> str:
    """Return the error of an author's loader in one line; it may lack a job's options or data."""
    if isinstance(error, StopIteration):
        return "it ended before the first batch"
    return str(error).partition("\n")[0] if isinstance(error, ConfigError) else first_line(error)


def describe_batch(batch: Batch) -> str:
    """Return `tokens float32 [8, 4, 16, 16], labels int64 [8, 64]`."""
    return ", ".join(
        f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        for name, tensor in batch.items()
    )


def check_dataloader(dataloader: Any, job_config: JobConfig) -> None:
    """Raise `ConfigError` if a loader lacks something that the trainer needs later."""
    checkpoint = job_config.checkpoint
    has_state = checkpoint.enable or not checkpoint.initial_load_model_only
    wanted = (*_METHODS, *_STATE_METHODS) if has_state else _METHODS
    missing = [name for name in wanted if not _has(dataloader, name)]
    needed = f". A data loader needs {', '.join(_METHODS)} and, for checkpoints, "
    needed += f"{', '.join(_STATE_METHODS)}; see torchtitan.components.DataLoader"
    refuse_incomplete(dataloader, builder(job_config), missing, needed)
    if job_config.training.batch_size_ramp and not getattr(dataloader, "takes_ramp", False):
        problem = f"{builder(job_config)} gives a loader without takes_ramp = True"
        fail(job_config, "training.batch_size_ramp", problem)
    if has_state:
        check_state(dataloader.state_dict(), job_config)


def _has(dataloader: Any, name: str) -> bool:
    # next() looks up the type, so a `__getattr__` on the instance does not provide it.
    return callable(getattr(type(dataloader) if name == "__next__" else dataloader, name, None))


def check_state(state: Any, job_config: JobConfig) -> None:
    """Raise `ConfigError` if a checkpoint could not hold a loader's state."""
    rows = state.get("rows") if isinstance(state, dict) else None
    if isinstance(rows, torch.Tensor) and rows.dtype == torch.int64 and rows.ndim == 2:
        return
    if isinstance(rows, torch.Tensor):
        found = f"rows of {rows.dtype} {list(rows.shape)}"
    else:
        found = some(state) if isinstance(state, dict) else repr(state)
    raise ConfigError(
        f'{builder(job_config)}: the loader\'s state_dict() has {found}. It must be {{"rows": '
        "int64 tensor [rows of this rank, k]}, which checkpoints distribute over any number of "
        "ranks: one row per sequence of the global batch, global_batch_size / dp_world_size on "
        "each rank"
    )


def builder(job_config: JobConfig) -> str:
    return f"build_dataloader_fn of {job_config.model.name}"


def some(names: Any) -> str:
    return ", ".join(map(repr, names)) or "nothing"


def next_batch(dataloader: Any, job_config: JobConfig, step: int) -> Batch:
    """Return the next micro-batch, for `step`.

    Raises:
        DataError: the loader has ended. After a restart it would end at the same place.
        OutageError: see `loader_outages`.
    """
    try:
        with loader_outages(job_config):
            return cast(Batch, next(dataloader))
    except StopIteration as error:
        raise DataError(
            f"{builder(job_config)}: the loader ended in step {step} of "
            f"{job_config.training.steps}. Its __next__ must never end: after the last batch, "
            "start again with the first data"
        ) from error


@contextmanager
def loader_outages(job_config: JobConfig) -> Iterator[None]:
    """Turn transient errors of an author's loader, such as a reset connection, into `OutageError`.

    After an `OutageError` the run is restarted later, not at once.
    """
    try:
        yield
    except (TitanError, StopIteration):
        raise
    except Exception as error:
        if disk_is_full(error) or not may_pass(error):
            raise
        logger.exception("where the data loader failed:")  # it may be a bug of the author after all
        raise OutageError(
            f"{builder(job_config)}: {first_line(error)}. This may be temporary: start the run "
            "again"
        ) from error
