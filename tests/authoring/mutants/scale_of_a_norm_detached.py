"""A norm's scale is taken for a constant in the backward pass."""

from __future__ import annotations

import torch.nn as nn
from mutants import base

CAUGHT_BY = ("learning.slope",)
SAYS = r"is layers\.3\.attention\.wo\.weight.*follows layers\.3\.attention\.wo is.*detach\(\)"


class Norm(nn.RMSNorm):
    def forward(self, x):
        scale = x.detach().float().square().mean(-1, keepdim=True).add(self.eps).rsqrt()
        return (x * scale.to(x.dtype)) * self.weight


base.register(__name__, model_cls=base.with_layers(norm=Norm))
