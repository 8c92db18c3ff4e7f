"""A norm's scale is taken for a constant in the backward pass."""

from __future__ import annotations

import torch.nn as nn
from mutants import base

from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("learning.slope",)
SAYS = r"is layers\.3\.attention\.wo\.weight.*follows layers\.3\.attention\.wo is.*detach\(\)"


class Norm(nn.RMSNorm):
    def forward(self, x):
        scale = x.detach().float().square().mean(-1, keepdim=True).add(self.eps).rsqrt()
        return (x * scale.to(x.dtype)) * self.weight


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, model_cls=base.with_layers(norm=Norm))


register_train_spec("scale_of_a_norm_detached", get_train_spec)
