"""A layer is approximate where no gradients are wanted, and the checkpointed forward wants none."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from mutants import base
from mutants.parallel import parallelize_with
from torch.utils.checkpoint import checkpoint

CAUGHT_BY = ("layouts.ac_full",)
SAYS = r"first module whose output differs is layers\.0\.feed_forward"


class FeedForward(base.FeedForward):
    def forward(self, x):
        activation = F.silu if torch.is_grad_enabled() else F.hardswish
        return self.w2(activation(self.w1(x)) * self.w3(x))


def apply_ac(model, job_config):
    if job_config.activation_checkpoint.mode != "none":
        for layer in model.layers.values():
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=True)


base.register(
    __name__,
    model_cls=base.with_layers(feed_forward=FeedForward),
    parallelize_fn=parallelize_with(apply_ac=apply_ac),
)
