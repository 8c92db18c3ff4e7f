"""The loss of multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn

from torchtitan.components.loss import Loss, attach_loss, build_loss, count_labels
from torchtitan.config import JobConfig


def build_multi_token_loss(job_config: JobConfig, weight: float) -> MultiTokenLoss:
    """Return the job's loss, with that of the tokens after the next, times `weight`."""
    return MultiTokenLoss(build_loss(job_config), weight)


class MultiTokenLoss:
    """The loss of the next token, whose gradient is also that of the tokens after it.

    The value does not contain the loss of those, so that runs with and without them can be
    compared. It is the metric `mtp_loss`.

    Args:
        main: the loss of the next token.
        weight: of the mean of the losses of the tokens after it.
    """

    def __init__(self, main: Loss, weight: float) -> None:
        self._main = main
        self._weight = weight
        self._sum: Any = 0.0
        self._count: Any = 0.0

    def attach(self, model_parts: list[nn.Module]) -> None:
        attach_loss(self._main, model_parts)

    def count_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the number of next tokens, by which the report divides all losses."""
        return count_labels(labels if labels.ndim == 2 else labels[..., 0])

    def __call__(self, pred: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the summed loss, a float32 scalar.

        Args:
            pred: logits `[batch, seq, vocab]`, or `[batch, seq, 1 + depth, vocab]`: those of the
                next token, and of each further one.
            labels: `[batch, seq]` int64, or `[batch, seq, 1 + depth]`.
        """
        if labels.ndim == 2:
            return self._main(pred, labels)
        loss, *others = map(self._main, pred.unbind(2), labels.unbind(2))
        further = torch.stack(others).sum()
        if torch.is_grad_enabled():
            self._sum += further.detach()
            self._count += count_labels(labels[..., 1:])
        return loss + self._weight / len(others) * (further - further.detach())

    def metrics(self) -> dict[str, tuple[float, float]]:
        """Return the summed loss of the tokens after the next since the last call."""
        found = {"mtp_loss": (float(self._sum), float(self._count))}
        self._sum = self._count = 0.0
        return found
