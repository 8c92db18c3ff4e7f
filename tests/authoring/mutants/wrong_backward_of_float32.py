"""A function of its own with a wrong sign in its backward pass, for which there is no float64."""

from __future__ import annotations

import torch
from mutants import base, wrong_backward

CAUGHT_BY = ("learning.slope",)
SAYS = r"is layers\.3\.feed_forward\.w[13]\.weight.*Function"


class SwiGLU(wrong_backward.SwiGLU):
    @staticmethod
    def forward(ctx, a, b):
        if a.dtype == torch.float64:
            raise TypeError("float64 is not supported")
        return wrong_backward.SwiGLU.forward(ctx, a, b)


class FeedForward(base.FeedForward):
    def forward(self, x):
        return self.w2(SwiGLU.apply(self.w1(x), self.w3(x)))


base.register(__name__, model_cls=base.with_layers(feed_forward=FeedForward))
