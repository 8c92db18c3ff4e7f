"""Right models whose gradients are no slopes: of weights -1, 0 and 1, and scaled gradients."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from mutants import base


class TernaryLinear(nn.Linear):
    """With a straight-through estimator, as BitNet b1.58 has."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.weight.abs().mean()
        ternary = (self.weight / scale).round().clamp(-1, 1) * scale
        return F.linear(x, self.weight + (ternary - self.weight).detach())


class FeedForward(base.FeedForward):
    def __init__(self, args: base.Args) -> None:
        super().__init__(args)
        self.w2 = TernaryLinear(args.ffn_dim, args.dim, bias=False)


class ScaledFeedForward(base.FeedForward):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(0.1 * x + 0.9 * x.detach())


class Model(base.Model):
    estimates_gradients = True


base.register("ternary", model_cls=base.with_layers(feed_forward=FeedForward))
scaled = base.with_layers(feed_forward=ScaledFeedForward, model=Model)
base.register("scaled_gradients", model_cls=scaled)
