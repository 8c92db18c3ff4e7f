"""The loss of held-out images at fixed shares of noise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn

from torchtitan.components.data_loader import Batch
from torchtitan.components.loss import count_labels
from torchtitan.components.validator import Evaluate, sum_over_data
from torchtitan.config.batch import UNSET_VALIDATION_BATCH, batch_shape
from torchtitan.data.build import VALIDATION_SEED
from torchtitan.data.samples import generator_of, stacked
from torchtitan.errors import begin_errors_with
from torchtitan.runtime.device import device

from .data import open_images, sample_maker
from .model.args import FluxModelArgs

if TYPE_CHECKING:
    from torchtitan.config import JobConfig
    from torchtitan.distributed.parallel_dims import ParallelDims

SHARES = [(2 * i + 1) / 16 for i in range(8)]
"""Of noise. Their losses differ by more than models do, so a mean of random ones would be noisy."""


class FluxValidator:
    """Evaluates `validation.steps` batches, each at the next of `SHARES`.

    Images, noise and shares are the same each time and on every layout: the data ranks share the
    batches, which take several passes if `validation.local_batch_size` is unset and training's is
    smaller than `UNSET_VALIDATION_BATCH`. Samples that fill up a pass have no labels that count.
    """

    def __init__(
        self,
        args: FluxModelArgs,
        job_config: JobConfig,
        tokenizer: None,
        loss_fn: object,
        parallel_dims: ParallelDims,
        dp_rank: int,
        dp_world_size: int,
    ) -> None:
        self._images = open_images(args, job_config, "validation")
        self._make = sample_maker(args, job_config, "validation")
        self._parallel_dims = parallel_dims
        self._steps = job_config.validation.steps
        self._size = job_config.validation.local_batch_size or UNSET_VALIDATION_BATCH
        self._in_pass = batch_shape(job_config, "validation")[0]
        self._passes = -(-self._size // self._in_pass)
        self._rank, self._ranks = dp_rank, dp_world_size
        self._losses: dict[str, float] = {}

    def validate(self, model_parts: list[nn.Module], evaluate: Evaluate) -> float:
        """Return the mean loss, see `Validator`."""
        losses = torch.zeros(len(SHARES), dtype=torch.float64, device=device())
        counts = torch.zeros_like(losses, device="cpu")
        for first in range(0, self._steps * self._passes, self._ranks):  # equally many on all ranks
            step, part = divmod(first + self._rank, self._passes)
            batch = self._batch(step, part)
            losses[step % len(SHARES)] += evaluate(batch)
            counts[step % len(SHARES)] += count_labels(batch["labels"])
        own = torch.stack([losses.cpu(), counts], dim=1)
        sums = sum_over_data(own, self._parallel_dims)
        total, *each = torch.cat([sums.sum(0, keepdim=True), sums]).tolist()
        every = zip(SHARES, each, strict=True)
        self._losses = {f"loss/noise_{share}": loss / n for share, (loss, n) in every if n}
        return total[0] / total[1]

    def _batch(self, step: int, part: int) -> Batch:
        samples = []
        for place in range(part * self._in_pass, (part + 1) * self._in_pass):
            number = step * self._size + place
            random, share = generator_of(VALIDATION_SEED, number), SHARES[step % len(SHARES)]
            index = number % len(self._images)
            with begin_errors_with(f"validation.dataset: row {index} (from 0)"):
                row: Any = self._images[index]
                sample = self._make(row, random, share)
            if step >= self._steps or place >= self._size:
                sample["labels"].fill_(torch.nan)
            samples.append(sample)
        return stacked(samples)

    def metrics(self) -> dict[str, float]:
        """Return the loss at each share of noise."""
        return self._losses

    def close(self) -> None:
        pass
