"""Rotary angles are computed in float64."""

from __future__ import annotations

from mutants import base

CAUGHT_BY = ("numerics.float64",)
SAYS = r"in MutantModel\.layers\.0\.attention makes a torch\.float64"


class Attention(base.Attention):
    def rotate(self, x, positions):
        return super().rotate(x.double(), positions).to(x.dtype)


base.register(__name__, model_cls=base.with_layers(attention=Attention))
