"""The gate of the feed-forward layer is detached from the graph."""

from __future__ import annotations

import torch.nn.functional as F
from mutants import base

from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("learning.gradients",)
SAYS = r"4 of 39 parameters get no gradient: layers\.0\.feed_forward\.w3\.weight"


class FeedForward(base.FeedForward):
    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x).detach())


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, model_cls=base.with_layers(feed_forward=FeedForward))


register_train_spec("dead_parameter", get_train_spec)
