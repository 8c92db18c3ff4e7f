"""Queries and keys are not rotated."""

from __future__ import annotations

from mutants import base

CAUGHT_BY = ("semantics.order", "semantics.positions")
SAYS = r"in no layer does the order of earlier tokens matter .* rope_theta"


class Attention(base.Attention):
    def rotate(self, x, positions):
        return x


base.register(__name__, model_cls=base.with_layers(attention=Attention))
