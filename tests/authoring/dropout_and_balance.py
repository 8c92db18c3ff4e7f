"""A right model with dropout, whose backward pass gives a loss of its own a gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from mutants import base


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grad, grad.new_ones(())


class FeedForward(base.FeedForward):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.dropout(super().forward(x), 0.1, self.training)
        if not self.training:
            return out
        return _WithLoss.apply(out, 1e-3 * out.square().mean(0).sum())


base.register(__name__, model_cls=base.with_layers(feed_forward=FeedForward))
