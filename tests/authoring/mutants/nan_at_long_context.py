"""A temperature by position is the root of a negative number from 1,025 tokens on."""

from __future__ import annotations

from mutants import base

CAUGHT_BY = ("numerics.finite",)
SAYS = r"at 2048 tokens in float32, the output of layers\.0\.attention.* is not finite"


class Attention(base.Attention):
    def rotate(self, x, positions):
        temperature = (1024.0 - positions[..., None, None]).sqrt() / 32
        return super().rotate(x, positions) * temperature


base.register(__name__, model_cls=base.with_layers(attention=Attention))
