"""Sequences of a step, and how the ranks share them."""

from __future__ import annotations

from typing import Literal

from torchtitan.errors import WorldSizeError
from torchtitan.tools.multiples import divisors, nearest_multiples

from .job_config import JobConfig
from .load import fail

UNSET_VALIDATION_BATCH = 8
"""Sequences that a step of validation stands for where `validation.local_batch_size` is unset: not
that of training, which belongs to the layout, so that all layouts are measured on the same ones."""


def batch_shape(
    job_config: JobConfig, section: Literal["training", "validation"]
) -> tuple[int, int]:
    """`(local_batch_size, seq_len)` of a forward pass; validation's are training's where unset."""
    training, config = job_config.training, getattr(job_config, section)
    return (
        config.local_batch_size or training.local_batch_size,
        config.seq_len or training.seq_len,
    )


def resolve_batch(job_config: JobConfig, dp_world_size: int) -> tuple[int, int]:
    """`(global_batch_size, accumulation_steps)`: sequences in a step, and forward passes of a rank.

    Raises:
        WorldSizeError: `training.global_batch_size` is not a whole number of passes of all ranks.
    """
    training = job_config.training
    one_pass = training.local_batch_size * dp_world_size
    if training.global_batch_size == -1:
        return one_pass, 1
    if training.global_batch_size % one_pass:
        fail(
            job_config,
            "training.global_batch_size",
            f"must be a multiple of training.local_batch_size ({training.local_batch_size}) x data "
            f"ranks ({dp_world_size}) = {one_pass}. "
            f"Nearest: {nearest_multiples(training.global_batch_size, one_pass)}"
            f"{_fitting_data_ranks(training.global_batch_size, training.local_batch_size)}",
            WorldSizeError,
        )
    return training.global_batch_size, training.global_batch_size // one_pass


def _fitting_data_ranks(global_batch_size: int, local_batch_size: int) -> str:
    """The end of a message: for a job whose number of ranks changes, the others that work."""
    passes, rest = divmod(global_batch_size, local_batch_size)
    if rest:
        return ""
    fitting = [str(ranks) for ranks in divisors(passes)]
    shown = ", ".join(fitting[:8]) + (", ..." if len(fitting) > 8 else "")
    return f". {global_batch_size} works on these numbers of data ranks: {shown}"
