"""F.dropout without training=self.training."""

from __future__ import annotations

import torch.nn.functional as F
from mutants import base

from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("semantics.repeatable",)
SAYS = r"first module that differs is layers\.0\.feed_forward"


class FeedForward(base.FeedForward):
    def forward(self, x):
        return F.dropout(super().forward(x), p=0.1)


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, model_cls=base.with_layers(feed_forward=FeedForward))


register_train_spec("dropout_in_evaluation", get_train_spec)
