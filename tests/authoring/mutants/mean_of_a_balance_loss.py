"""A loss is added in the backward pass as a mean over the tokens of a forward pass."""

from __future__ import annotations

import torch
from mutants import base

CAUGHT_BY = ("layouts.accumulation", "layouts.fsdp2")
SAYS = r"gradient differs is layers\..*must be a sum over tokens, not a mean"


class AddLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, loss):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.ones((), dtype=torch.float32)


class Block(base.Block):
    def forward(self, x, positions, mask):
        x = super().forward(x, positions, mask)
        return AddLoss.apply(x, 0.1 * x.float().square().mean())


base.register(__name__, model_cls=base.with_layers(block=Block))
