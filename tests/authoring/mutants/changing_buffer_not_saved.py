"""A buffer that training changes is not persistent, so that a resumed run begins it anew."""

from __future__ import annotations

import torch
from mutants import base

CAUGHT_BY = ("checkpoints.resume",)
SAYS = r"after a resume, the weight layers\.0\.feed_forward\.steps"


class FeedForward(base.FeedForward):
    def __init__(self, args):
        super().__init__(args)
        self.register_buffer("steps", torch.zeros(()), persistent=False)

    def forward(self, x):
        if self.training:
            self.steps += 1
        return super().forward(x)

    def reset_parameters(self):
        self.steps.zero_()


base.register(__name__, model_cls=base.with_layers(feed_forward=FeedForward))
