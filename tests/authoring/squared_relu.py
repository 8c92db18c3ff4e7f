"""A right model of four letters with a squared ReLU, many of whose features no letter activates.

And wrong ones: squared_relu_detached, squared_relu_unused, squared_relu_wrong_sign.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from mutants import base

from torchtitan.protocols import TrainSpec, register_train_spec


class FeedForward(base.FeedForward):
    def activation(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x).square()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(self.activation(self.w1(x)) * self.w3(x))


class Detached(FeedForward):
    def activation(self, x: torch.Tensor) -> torch.Tensor:
        return super().activation(x).detach()


class Unused(FeedForward):
    """Takes the first half of the features twice."""

    def activation(self, x: torch.Tensor) -> torch.Tensor:
        half = super().activation(x).chunk(2, -1)[0]
        return torch.cat([half, half], -1)


class _WrongSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return F.relu(x).square()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return -2 * F.relu(ctx.saved_tensors[0]) * grad


class WrongSign(FeedForward):
    def activation(self, x: torch.Tensor) -> torch.Tensor:
        return _WrongSign.apply(x)


def get_train_spec(flavor: str, feed_forward: type[FeedForward]) -> TrainSpec:
    return base.get_train_spec(
        flavor,
        model_cls=base.with_layers(feed_forward=feed_forward),
        model_args=base.Args(vocab_size=4),
        state_dict_adapter=None,
    )


for name, cls in {
    "squared_relu": FeedForward,
    "squared_relu_detached": Detached,
    "squared_relu_unused": Unused,
    "squared_relu_wrong_sign": WrongSign,
}.items():
    register_train_spec(name, partial(get_train_spec, feed_forward=cls))
