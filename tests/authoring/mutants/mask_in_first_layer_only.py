"""All layers but the first attend to their own token alone."""

from __future__ import annotations

import torch.nn as nn
from mutants import base

CAUGHT_BY = ("semantics.memory",)
SAYS = r"layers\.1: no token sees an earlier one"


class Model(base.Model):
    def __init__(self, args: base.Args) -> None:
        super().__init__(args)
        for name, layer in self.layers.items():
            if name != "0":
                layer.attention.inner_attention = OwnAlone()


class OwnAlone(nn.Module):
    def forward(self, q, k, v, mask):
        return v


base.register(__name__, model_cls=Model)
