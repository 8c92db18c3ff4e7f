"""Attention is scaled by the length of the sequence, so later tokens change what came before."""

from __future__ import annotations

import math

from mutants import base

CAUGHT_BY = ("semantics.lengths",)
SAYS = r"first module that differs is layers\.0\.attention"


class Attention(base.Attention):
    def forward(self, x, positions, mask):
        return super().forward(x, positions, mask) * math.log(x.shape[1] + 1)


base.register(__name__, model_cls=base.with_layers(attention=Attention))
