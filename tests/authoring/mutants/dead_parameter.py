"""The gate of the feed-forward layer is detached from the graph."""

from __future__ import annotations

import torch.nn.functional as F
from mutants import base

CAUGHT_BY = ("learning.gradients",)
SAYS = r"4 of 39 parameters get no gradient: layers\.0\.feed_forward\.w3\.weight"


class FeedForward(base.FeedForward):
    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x).detach())


base.register(__name__, model_cls=base.with_layers(feed_forward=FeedForward))
