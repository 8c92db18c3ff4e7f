"""Collect losses and gradient norms of the steps since the last logged one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from torchtitan.runtime.host_sum import sum_over_ranks
from torchtitan.tools.logging import rank0

if TYPE_CHECKING:
    from torchtitan.distributed.parallel_dims import ParallelDims


class StepStats:
    """Losses and gradient norms since the last logged step; they stay on the device until read."""

    def __init__(self) -> None:
        self.tokens = 0
        """Tokens of the steps, also of skipped ones, which take time; without batches left out."""
        self.data_wait = 0.0
        """Seconds that this rank waited for batches."""
        self.lr = math.nan
        """Learning rate of the last step."""
        self.grad_norm = math.nan
        """Gradient norm of the last step that was read."""
        self.without_labels = 0
        """Steps in which no label counts, such as steps of prompts alone."""
        self._unread: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self._losses: list[float] = []

    def add(self, step: int, local_loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """Add a step. `local_loss` is this rank's share; the sum over ranks is the step's loss."""
        self._unread.append((step, local_loss, grad_norm))

    def read(self, parallel_dims: ParallelDims) -> list[tuple[int, float, float]]:
        """Fetch new values from the device; return `(step, loss, gradient norm)` of each step."""
        if not self._unread:
            return []
        steps, losses, norms = zip(*self._unread, strict=True)
        self._unread = []
        # On the host: with other groups in use, one of all ranks would only take the GPU's memory.
        summed = torch.stack(losses).double().cpu()
        sum_over_ranks(summed)
        values = (summed / parallel_dims.loss_copies).tolist()
        grad_norms = torch.stack(norms).tolist()
        self._losses += values
        self.grad_norm = grad_norms[-1]
        return list(zip(steps, values, grad_norms, strict=True))

    def warn_of_missing_labels(self, step: int) -> None:
        """Warn on rank 0 of steps that trained on nothing. Call it after `read`."""
        if self.without_labels:
            rank0.warning(
                "step %d: in %d of the last %d steps no label counts: all are IGNORE_INDEX (-100), "
                "or NaN. Their loss is 0, and the model learns nothing from them",
                *(step, self.without_labels, len(self._losses)),
            )

    @property
    def mean_loss(self) -> float:
        """Mean loss of the steps; NaN if all were skipped."""
        return sum(self._losses) / len(self._losses) if self._losses else math.nan

    @property
    def max_loss(self) -> float:
        return max(self._losses, default=math.nan)
