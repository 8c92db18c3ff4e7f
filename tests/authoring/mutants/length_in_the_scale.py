"""Attention is scaled by the length of the sequence, so padding changes what came before."""

from __future__ import annotations

import math

from mutants import base

from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("semantics.padding", "semantics.lengths")
SAYS = r"first module that differs is layers\.0\.attention"


class Attention(base.Attention):
    def forward(self, x, positions, mask):
        return super().forward(x, positions, mask) * math.log(x.shape[1] + 1)


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, model_cls=base.with_layers(attention=Attention))


register_train_spec("length_in_the_scale", get_train_spec)
