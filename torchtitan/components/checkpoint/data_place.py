"""Whether the place in the data that a checkpoint has is one of this run's data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from torchtitan.errors import CheckpointError

if TYPE_CHECKING:
    from torchtitan.config import JobConfig

    from .load import OpenCheckpoint

_WAY_OUT = 'checkpoint.exclude_from_loading = ["dataloader"] to begin the data anew'


def check_data(
    checkpoint: OpenCheckpoint, job_config: JobConfig, own_rows: torch.Tensor, dp_size: int
) -> None:
    """Raises `CheckpointError` if the loader cannot go on from the place in a checkpoint.

    Args:
        own_rows: the loader's `state_dict()["rows"]`, `[rows of this rank, k]`.
        dp_size: data ranks that share a global batch, those of this replica group.
    """
    folder = checkpoint.folder
    rows: Any = checkpoint.metadata.state_dict_metadata.get("dataloader.rows")
    if rows is None:
        return
    saved, current = rows.size[0], len(own_rows) * dp_size
    if saved != current:
        raise CheckpointError(
            f"{folder} was saved with a global batch of {saved} sequences, but "
            f"training.global_batch_size is {current} now. Set it to {saved}, which holds for any "
            f"number of data ranks that divides it, or set {_WAY_OUT}"
        )
    if rows.size[1] != own_rows.shape[1]:
        raise CheckpointError(
            f"{folder} was saved with another number of data.sources or another data.packing. "
            f"Restore them, or set {_WAY_OUT}"
        )
    seq_len, now = saved_seq_len(checkpoint), job_config.training.seq_len
    if job_config.data.packing == "best_fit" and seq_len not in (None, now):
        raise CheckpointError(
            f"{folder} was saved with training.seq_len = {seq_len}, but it is {now} now, and "
            f'data.packing = "best_fit" packs documents for one length. Set it to {seq_len}, or '
            f"set {_WAY_OUT}"
        )


def saved_seq_len(checkpoint: OpenCheckpoint) -> int | None:
    """`training.seq_len` of the run that saved it; None in one that does not say."""
    return checkpoint.manifest.model.get("seq_len")
