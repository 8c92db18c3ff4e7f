"""Check that a checkpoint's position in the data fits this run's data."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from torchtitan.components.data_loader import builder, has_own_loader
from torchtitan.errors import CheckpointError
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools.logging import rank0

if TYPE_CHECKING:
    from torchtitan.config import JobConfig

    from .load import OpenCheckpoint


_WAY_OUT = 'checkpoint.exclude_from_loading = ["dataloader"] to restart the data from the beginning'
_WAY_OUT += ", so that documents already seen are repeated"


def check_data(
    checkpoint: OpenCheckpoint,
    saved_config: dict[str, Any],
    job_config: JobConfig,
    own_rows: torch.Tensor,
    dp_size: int,
) -> None:
    """Raise `CheckpointError` if the loader cannot continue from a checkpoint's position.

    Args:
        saved_config: configuration of the run that saved the checkpoint; empty: unknown.
        own_rows: the loader's `state_dict()["rows"]`, `[rows of this rank, k]`.
        dp_size: number of data ranks of this replica group, which share a global batch.
    """
    folder = checkpoint.folder
    rows: Any = checkpoint.metadata.state_dict_metadata.get("dataloader.rows")
    if rows is None:
        return
    saved, current = rows.size[0], len(own_rows) * dp_size
    if rows.size != torch.Size((current, own_rows.shape[1])) and _has_own_loader(job_config):
        raise CheckpointError(
            f"{folder} has loader states with rows of shape {list(rows.size)} over all data "
            f"ranks, but the loaders of {builder(job_config)} now have "
            f"{[current, own_rows.shape[1]]}. If each row belongs to a sequence of the global "
            "batch, their number does not depend on the number of data ranks. Restore the "
            "settings that determine the rows, such as training.global_batch_size or the number "
            f"of data ranks, or set {_WAY_OUT}"
        )
    if saved != current:
        raise CheckpointError(
            f"{folder} was saved with a global batch of {saved} sequences, but "
            f"training.global_batch_size is {current} now. Set it to {saved}, which works on any "
            f"number of data ranks that divides it, or set {_WAY_OUT}"
        )
    if rows.size[1] != own_rows.shape[1]:
        raise CheckpointError(
            f"{folder} was saved with another number of data.sources or another data.packing. "
            f"Restore them, or set {_WAY_OUT}"
        )
    names = [source.name or source.dataset for source in job_config.data.sources]
    saved_names = source_names(saved_config)
    if len(names) == len(saved_names) and names != saved_names:
        raise CheckpointError(
            f"{folder} was saved with the data.sources {json.dumps(saved_names)}, but they are "
            f"{json.dumps(names)} now, and each would resume at the position of the source that "
            f"had its index. Restore their names and order, or set {_WAY_OUT}"
        )
    seq_len, now = saved_seq_len(checkpoint), job_config.training.seq_len
    if job_config.data.packing == "best_fit" and seq_len not in (None, now):
        raise CheckpointError(
            f"{folder} was saved with training.seq_len = {seq_len}, but it is {now} now, and "
            f'data.packing = "best_fit" packs documents for a fixed length. Set it to {seq_len}, '
            f"or set {_WAY_OUT}"
        )
    add_bos, now_bos = saved_config.get("data", {}).get("add_bos", False), job_config.data.add_bos
    if job_config.data.packing == "best_fit" and saved_config and add_bos != now_bos:
        raise CheckpointError(
            f"{folder} was saved with data.add_bos = {json.dumps(add_bos)}, and data.packing = "
            f'"best_fit" packed the documents that way. Restore it, or set {_WAY_OUT}'
        )


def _has_own_loader(job_config: JobConfig) -> bool:
    spec = get_train_spec(job_config.model.name, job_config.model.flavor)
    return has_own_loader(spec.build_dataloader_fn)


def saved_seq_len(checkpoint: OpenCheckpoint) -> int | None:
    """Return `training.seq_len` of the run that saved the checkpoint; None if not recorded."""
    return checkpoint.manifest.model.get("seq_len")


def source_names(config: dict[str, Any]) -> list[str]:
    """Return the names of `data.sources` in a configuration that was written as TOML."""
    sources = config.get("data", {}).get("sources", [])
    return [source.get("name") or source.get("dataset", "") for source in sources]


def warn_of_changed_data(checkpoint: OpenCheckpoint, current: dict[str, Any]) -> None:
    """Warn on rank 0 if a source has changed its size or content since the checkpoint was saved.

    Args:
        current: `RunState.describe_data()`.
    """
    was, now = (data.get("sources", []) for data in (checkpoint.manifest.data, current))
    changes = []
    for old, new in zip(was, now, strict=False):
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
            checkpoint.folder,
            "; ".join(changes),
            _WAY_OUT,
        )
