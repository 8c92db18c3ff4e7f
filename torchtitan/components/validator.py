"""What the trainer asks of a validator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn as nn

from torchtitan.components.data_loader import Batch

Evaluate = Callable[[Batch], torch.Tensor]
"""The trainer's: batch -> its summed loss, a scalar; 0 on ranks without the last stage."""


class Validator(Protocol):
    """What `build_validator_fn` returns."""

    def validate(self, model_parts: list[nn.Module], evaluate: Evaluate) -> float:
        """The mean loss of what counts, the same on every rank. All ranks call it together.

        The sums of all processes hold the loss `ParallelDims.loss_copies` times, and what counts
        (`torchtitan.components.loss.count_labels`) `ParallelDims.non_data_parallel_size` times.

        Args:
            model_parts: in eval mode meanwhile, and seeded alike each time.
            evaluate: called equally often on every rank, with batches as of the data loader; under
                pipeline parallelism of as many samples as
                `torchtitan.config.batch.batch_shape(job_config, "validation")` says. It has no
                gradients.
        """

    def close(self) -> None:
        """Stop what runs in the background. Called once, also after an error."""
