"""The validator interface that the trainer needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn as nn

from torchtitan.components.data_loader import Batch

Evaluate = Callable[[Batch], torch.Tensor]
"""Function of the trainer: batch -> summed loss, a scalar; 0 on ranks without the last stage."""


class Validator(Protocol):
    """Interface that `build_validator_fn` returns.

    It may also have `metrics() -> dict[str, float]`: more values of the last validation, alike on
    every rank, for `validation.jsonl`.
    """

    def validate(self, model_parts: list[nn.Module], evaluate: Evaluate) -> float:
        """Return the mean loss over labels that count, alike on every rank. All ranks call this.

        A sum over all processes contains the loss `ParallelDims.loss_copies` times, and the number
        of labels that count (`torchtitan.components.loss.count_labels`)
        `ParallelDims.non_data_parallel_size` times.

        Args:
            model_parts: model parts in eval mode; the trainer sets the same seed each time.
            evaluate: call it equally often on every rank, with batches like the data loader's.
                Under pipeline parallelism their number of samples must be that of
                `torchtitan.config.batch.batch_shape(job_config, "validation")`. It computes no
                gradients.
        """

    def close(self) -> None:
        """Stop background work. Called once, also after an error."""
