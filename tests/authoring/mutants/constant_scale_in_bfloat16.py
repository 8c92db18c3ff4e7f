"""A norm's scale is taken for a constant in the backward pass, but in bfloat16 alone."""

from __future__ import annotations

import torch
import torch.nn as nn
from mutants import base

CAUGHT_BY = ("numerics.bf16_gradients",)
SAYS = r"with bfloat16 parameters .*, gradients differ from float32 by \d+\.\d%, but outputs by"


class Norm(nn.RMSNorm):
    def forward(self, x):
        seen = x.detach() if x.dtype == torch.bfloat16 else x
        scale = seen.float().square().mean(-1, keepdim=True).add(self.eps).rsqrt()
        return (x * scale.to(x.dtype)) * self.weight


base.register(__name__, model_cls=base.with_layers(norm=Norm))
