"""F.dropout without training=self.training."""

from __future__ import annotations

import torch.nn.functional as F
from mutants import base

CAUGHT_BY = ("semantics.repeatable",)
SAYS = r"first module that differs is layers\.0\.feed_forward"


class FeedForward(base.FeedForward):
    def forward(self, x):
        return F.dropout(super().forward(x), p=0.1)


base.register(__name__, model_cls=base.with_layers(feed_forward=FeedForward))
