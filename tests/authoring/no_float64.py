"""Right models with a kernel of their own that has no float64, or gives float32."""

from __future__ import annotations

import torch
from mutants import base


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        if x.dtype == torch.float64:
            raise TypeError("float64 is not supported")
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class NarrowSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(x.detach().numpy().astype("float32")).square()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class FeedForward(base.FeedForward):
    square = Square

    def forward(self, x):
        return self.w2(self.square.apply(self.w1(x)) * self.w3(x))


class NarrowFeedForward(FeedForward):
    square = NarrowSquare


base.register(__name__, model_cls=base.with_layers(feed_forward=FeedForward))
base.register("narrow_kernel", model_cls=base.with_layers(feed_forward=NarrowFeedForward))
