"""Loss on held-out data."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn as nn

from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.data import build_validation_dataloader

if TYPE_CHECKING:
    from torchtitan.components.loss import Loss
    from torchtitan.components.tokenizer import Tokenizer
    from torchtitan.config import JobConfig
    from torchtitan.distributed.parallel_dims import ParallelDims


class Validator:
    """Evaluates `validation.steps` batches, the same ones each time."""

    def __init__(
        self,
        job_config: JobConfig,
        tokenizer: Tokenizer,
        loss_fn: Loss,
        parallel_dims: ParallelDims,
        dp_rank: int,
        dp_world_size: int,
    ) -> None:
        self._steps = job_config.validation.steps
        self._loss_fn = loss_fn
        self._dataloader = build_validation_dataloader(
            job_config, tokenizer, dp_rank, dp_world_size
        )

    @torch.no_grad()
    def validate(
        self, model: nn.Module, predict: Callable[[dict[str, torch.Tensor]], Any]
    ) -> float:
        """Mean loss per valid token over all data ranks.

        Args:
            model: put into eval mode meanwhile.
            predict: runs the model on one batch, as the trainer does; returns (pred, labels).
        """
        model.eval()
        total = None
        self._dataloader.reset()
        for _ in range(self._steps):
            pred, labels = predict(next(self._dataloader))
            tokens = (labels != IGNORE_INDEX).sum()
            part = torch.stack([self._loss_fn(pred, labels).double(), tokens.double()])
            total = part if total is None else total + part
        model.train()
        # Ranks that share data would count it several times, in both numbers alike.
        dist.all_reduce(total)
        return (total[0] / total[1]).item()

    def close(self) -> None:
        self._dataloader.close()


def build_validator(
    job_config: JobConfig,
    tokenizer: Tokenizer,
    loss_fn: Loss,
    parallel_dims: ParallelDims,
    dp_rank: int,
    dp_world_size: int,
) -> Validator:
    return Validator(job_config, tokenizer, loss_fn, parallel_dims, dp_rank, dp_world_size)
