"""A function of its own, SwiGLU, whose backward pass has a wrong sign."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mutants import base

CAUGHT_BY = ("learning.slope",)
SAYS = r"the last in the order of forward\(\) is layers\.3\.feed_forward\.w[13]\.weight.*Function"


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return F.silu(a) * b

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        gate = a.sigmoid()
        return grad * b * gate * (1 + a * gate), grad * F.silu(a)  # right: 1 + a * (1 - gate)


class FeedForward(base.FeedForward):
    def forward(self, x):
        return self.w2(SwiGLU.apply(self.w1(x), self.w3(x)))


base.register(__name__, model_cls=base.with_layers(feed_forward=FeedForward))
