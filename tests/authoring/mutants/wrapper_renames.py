"""Activation checkpointing wraps each block in a module, whose name gets into every parameter's."""

from __future__ import annotations

import torch.nn as nn
from mutants import base
from mutants.parallel import parallelize_with
from torch.utils.checkpoint import checkpoint

CAUGHT_BY = (
    "layouts.ac_full",
    "layouts.ac_selective_op",
)
SAYS = r"different names: no rank has layers\.0\..*layers\.0\.inner\."


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args):
        return checkpoint(self.inner, *args, use_reentrant=False)

    def init_weights(self):
        self.inner.init_weights()


def apply_ac(model, job_config):
    if job_config.activation_checkpoint.mode != "none":
        for name, layer in model.layers.items():
            model.layers[name] = Checkpointed(layer)


base.register(__name__, parallelize_fn=parallelize_with(apply_ac=apply_ac))
