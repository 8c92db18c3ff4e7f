"""Fit a checkpoint's position in the data to this run's data, or refuse it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from torchtitan.components.data_loader import builder, has_own_loader
from torchtitan.config.batch import batch_sizes
from torchtitan.data.mixing import state_size
from torchtitan.data.refit import count_read_again, refit
from torchtitan.errors import CheckpointError
from torchtitan.protocols.train_spec import train_spec_of
from torchtitan.tools.logging import rank0

if TYPE_CHECKING:
    from torchtitan.config import JobConfig

    from .opened import OpenCheckpoint


_WAY_OUT = 'checkpoint.exclude_from_loading = ["dataloader"] to restart the data from the beginning'
_WAY_OUT += ", so that documents already seen are repeated"


class SavedPosition:
    """A checkpoint's position in the data, as the loaders of this run need it.

    Args:
        job_config: the configuration of this run.
        own_rows: the loader's `state_dict()["rows"]`, `[rows of this rank, k]`.
        dp_size: number of data ranks of this replica group, which share a global batch.
        described: `RunState.describe_data()`.

    Raises:
        CheckpointError: this run cannot continue from it.
    """

    def __init__(
        self,
        checkpoint: OpenCheckpoint,
        job_config: JobConfig,
        own_rows: torch.Tensor,
        dp_size: int,
        described: dict[str, Any],
    ) -> None:
        self._checkpoint, self._job_config, self._described = checkpoint, job_config, described
        self._own_loader = has_own_loader(train_spec_of(job_config).build_dataloader_fn)
        names = sources_before_and_now(checkpoint.config, job_config, self._own_loader)
        self._was, self._now = names
        self._dp_size = dp_size
        self._shape = torch.Size((len(own_rows) * dp_size, own_rows.shape[1]))
        """Of the rows of all data ranks: `[global batch, k]`."""
        rows: Any = checkpoint.metadata.state_dict_metadata.get("dataloader.rows")
        self._saved_shape: torch.Size | None = rows and rows.size
        """The same of the checkpoint; None if it has no position."""
        self._seq_len: int | None = checkpoint.manifest.model.get("seq_len")  # None: not recorded
        if self._saved_shape is not None:
            self._check(self._saved_shape)
        data = align_sources(checkpoint.manifest.data, described, self._was, self._now)
        self._warn_of_changes(data)
        self._step = checkpoint.manifest.step
        self.description = {"seq_len": self._seq_len, "step": self._step, "described": data}
        """The rest of a loader's state."""

    def target(self, rows: DTensor) -> torch.Tensor:
        """Return the tensor to read into: `rows`, or one that each rank reads whole, to refit."""
        saved = self._saved_shape
        if saved is None or (saved[0] == self._shape[0] and self._was == self._now):
            return rows
        return torch.zeros(*saved, dtype=torch.int64)

    def rows_of_rank(self, read: torch.Tensor, dp_rank: int) -> torch.Tensor:
        """Return the rows of a data rank, `[rows of this rank, k]`, from the read `target`."""
        if isinstance(read, DTensor):
            return read.to_local().cpu()
        table, batch = read.numpy(), self._shape[0]
        if again := count_read_again(table, self._was, batch):
            rank0.warning(
                "%s of the documents that were read come again, since the rows of the smaller "
                "global batch join rows that were not equally far",
                f"{again:,}",
            )
        sizes = batch_sizes(self._job_config, self._dp_size)
        rows = torch.from_numpy(refit(table, self._was, self._now, sizes, self._step))
        return rows.chunk(self._dp_size)[dp_rank]

    def _check(self, saved_shape: torch.Size) -> None:
        """Raise `CheckpointError` if the loader cannot continue from the position."""
        checkpoint, job_config, shape = self._checkpoint, self._job_config, self._shape

        def misfit(problem: str) -> CheckpointError:
            return CheckpointError(f"{checkpoint.folder} {problem}, or set {_WAY_OUT}")

        saved, current = saved_shape[0], shape[0]
        if self._own_loader:
            if saved_shape == shape:
                return
            raise misfit(
                f"has loader states with rows of shape {list(saved_shape)} over all data ranks, "
                f"but the loaders of {builder(job_config)} now have {list(shape)}. If each row "
                "belongs to a sequence of the global batch, their number does not depend on the "
                "number of data ranks. Restore the settings that determine the rows, such as "
                "training.global_batch_size or the number of data ranks"
            )
        best_fit = job_config.data.packing == "best_fit"
        replicas = job_config.fault_tolerance.enable
        divides = saved % current == 0 or current % saved == 0
        may_change = not best_fit and not replicas
        may_change &= all("documents" in source for source in self._described.get("sources", []))
        # -1 follows the number of ranks, so that another batch may be a mistake.
        chosen = job_config.training.global_batch_size != -1
        if saved != current and not (may_change and divides and chosen):
            others = (
                f", or to a multiple or a divisor of {saved}, to go on with documents not read yet"
            )
            raise misfit(
                f"was saved with a global batch of {saved} sequences, but "
                f"training.global_batch_size is {current} now. Set it to {saved}, which works on "
                f"any number of data ranks that divides it{others * may_change}"
            )
        was, now = self._was, self._now
        if replicas and was != now:
            raise misfit(
                f"was saved with the data.sources {json.dumps(was)}, but they are "
                f"{json.dumps(now)} now. With fault_tolerance.enable they must stay the same. "
                "Restore their names and order"
            )
        of_place = (shape[1] - state_size(len(now))) // len(now)
        if saved_shape[1] != state_size(len(was)) + of_place * len(was):
            raise misfit("was saved with another data.packing. Restore it")
        seq_len, new_len = self._seq_len, job_config.training.seq_len
        if best_fit and seq_len not in (None, new_len):
            raise misfit(
                f"was saved with training.seq_len = {seq_len}, but it is {new_len} now, and "
                f'data.packing = "best_fit" packs documents for a fixed length. Set it to {seq_len}'
            )
        add_bos = checkpoint.config.get("data", {}).get("add_bos", False)
        if best_fit and checkpoint.config and add_bos != job_config.data.add_bos:
            raise misfit(
                f"was saved with data.add_bos = {json.dumps(add_bos)}, and data.packing = "
                '"best_fit" packed the documents that way. Restore it'
            )

    def _warn_of_changes(self, data: dict[str, Any]) -> None:
        """Warn on rank 0 if sources have come or gone, or have changed their size or content.

        Args:
            data: the checkpoint's, after `align_sources`.
        """
        was, now = set(self._was), set(self._now)
        if was != now:
            come, gone = (json.dumps(sorted(a - b)) for a, b in ((now, was), (was, now)))
            rank0.warning(
                "data.sources have changed since %s was saved. New, from their first document: %s. "
                "Gone, with their position: %s. The others continue where they were",
                *(self._checkpoint.folder, come, gone),
            )
        changes = []
        sources = (of.get("sources", []) for of in (data, self._described))
        for old, new in zip(*sources, strict=False):
            name = new["name"] or "training.dataset"
            differing = {unit for unit in old.keys() & new.keys() if old[unit] != new[unit]}
            if unit := next(iter(differing & {"documents", "shards"}), None):
                changes.append(f"{name} had {old[unit]:,} {unit}, now {new[unit]:,}")
            elif "sample" in differing:
                changes.append(f"{name} has as many documents as before, but others")
        if changes:
            rank0.warning(
                "the data has changed since %s was saved: %s. The run resumes at the same document "
                "numbers, so documents may be repeated or left out. Restore the data, or set %s",
                *(self._checkpoint.folder, "; ".join(changes), _WAY_OUT),
            )


def sources_before_and_now(
    saved_config: dict[str, Any], job_config: JobConfig, own_loader: bool
) -> tuple[list[str], list[str]]:
    """Return the names of the sources of a checkpoint and of this run.

    A source continues where the one of its name was. One dataset without `data.sources` has the
    name of the dataset, and continues where another one was.

    Args:
        saved_config: `OpenCheckpoint.config`.
        own_loader: whether the loader is the model's own, see `has_own_loader`.
    """
    now = [source.name or source.dataset for source in job_config.data.sources]
    saved = saved_config.get("data", {}).get("sources", [])
    was = [source.get("name") or source.get("dataset", "") for source in saved]
    if not (was or now) or not saved_config or own_loader:
        was = now = now or [job_config.training.dataset]
    dataset = saved_config.get("training", {}).get("dataset", "")
    return was or [dataset], now or [job_config.training.dataset]


def align_sources(
    saved: dict[str, Any], current: dict[str, Any], was: list[str], now: list[str]
) -> dict[str, Any]:
    """Return a checkpoint's description of its data, with the sources of this run in their order.

    Args:
        saved: `Manifest.data`.
        current: `RunState.describe_data()`; describes sources that the checkpoint lacks.
        was, now: see `sources_before_and_now`.
    """
    if len(saved.get("sources", [])) != len(was) or len(current.get("sources", [])) != len(now):
        return saved
    known = dict(zip(now, current["sources"], strict=True)) | dict(
        zip(was, saved["sources"], strict=True)
    )
    return saved | {"sources": [known[name] for name in now]}
