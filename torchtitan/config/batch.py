"""Compute the batch of a step and how the ranks share it."""

from __future__ import annotations

import re
from typing import Literal

from torchtitan.errors import WorldSizeError
from torchtitan.tools.multiples import divisors, nearest_multiples

from .job_config import JobConfig
from .load import fail

UNSET_VALIDATION_BATCH = 8
"""Sequences in a validation step if `validation.local_batch_size` is unset. Training's batch size
depends on the layout; a fixed number validates all layouts on the same sequences."""


def batch_shape(
    job_config: JobConfig, section: Literal["training", "validation"]
) -> tuple[int, int]:
    """Return `(local_batch_size, seq_len)` of a forward pass; validation defaults to training's."""
    training, config = job_config.training, getattr(job_config, section)
    return (
        config.local_batch_size or training.local_batch_size,
        config.seq_len or training.seq_len,
    )


def resolve_batch(job_config: JobConfig, dp_world_size: int) -> tuple[int, int]:
    """Return `(global_batch_size, accumulation_steps)`: sequences a step, forward passes a rank.

    Raises:
        WorldSizeError: `training.global_batch_size` is no multiple of one pass of all data ranks.
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


def batches_to_skip(job_config: JobConfig) -> list[range]:
    """Return the ranges of batches that `training.skip_batches` names; the first batch is 1.

    Raises:
        ConfigError: an item is neither a number nor a range of them.
    """
    ranges = []
    for item in job_config.training.skip_batches:
        found = re.fullmatch(r"([1-9]\d{0,17})(?:-([1-9]\d{0,17}))?", item, re.ASCII)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last:
            problem = f"{item!r} is no batch such as '1300' and no range such as '1001-1250'"
            fail(job_config, "training.skip_batches", problem)
        ranges.append(range(first, last + 1))
    return ranges


def _fitting_data_ranks(global_batch_size: int, local_batch_size: int) -> str:
    """Return the end of a message: the numbers of data ranks that `global_batch_size` works on."""
    passes, rest = divmod(global_batch_size, local_batch_size)
    if rest:
        return ""
    fitting = [str(ranks) for ranks in divisors(passes)]
    shown = ", ".join(fitting[:8]) + (", ..." if len(fitting) > 8 else "")
    return f". Numbers of data ranks on which {global_batch_size} works: {shown}"
