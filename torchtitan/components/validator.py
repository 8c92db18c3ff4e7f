"""The validator interface that the trainer needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn as nn

from torchtitan.components.data_loader import Batch
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.runtime.host_sum import sum_over_ranks

Evaluate = Callable[[Batch], torch.Tensor]
"""Function of the trainer: batch -> summed loss, a scalar; 0 on ranks without the last stage."""


class Validator(Protocol):
    """Interface that `build_validator_fn` returns.

    It may also have `metrics() -> dict[str, float]`: more values of the last validation, alike on
    every rank, for `validation.jsonl`.
    """

    def validate(self, model_parts: list[nn.Module], evaluate: Evaluate) -> float:
        """Return the mean loss over labels that count, alike on every rank. All ranks call this.

        `sum_over_data` adds up what the ranks find.

        Args:
            model_parts: model parts in eval mode; the trainer sets the same seed each time.
            evaluate: call it equally often on every rank, with batches like the data loader's.
                Under pipeline parallelism their number of samples must be that of
                `torchtitan.config.batch.batch_shape(job_config, "validation")`. It computes no
                gradients.
        """

    def close(self) -> None:
        """Stop background work. Called once, also after an error."""


def sum_over_data(sums: torch.Tensor, parallel_dims: ParallelDims) -> torch.Tensor:
    """Add up the losses and labels of all ranks, those of ranks with the same data once.

    Args:
        sums: of this rank, float64 `[..., 2]`: what `Evaluate` returns, and the number of labels
            that count (`torchtitan.components.loss.count_of`).

    Returns:
        The same on each rank, on the host.
    """
    total = sums.to("cpu", copy=True)
    sum_over_ranks(total)
    copies = parallel_dims.loss_copies, parallel_dims.non_data_parallel_size
    return total / total.new_tensor(copies)
