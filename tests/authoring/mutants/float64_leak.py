"""Rotary angles are computed in float64."""

from __future__ import annotations

from mutants import base

from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("numerics.float64",)
SAYS = r"in MutantModel\.layers\.0\.attention makes a torch\.float64"


class Attention(base.Attention):
    def rotate(self, x, positions):
        return super().rotate(x.double(), positions).to(x.dtype)


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, model_cls=base.with_layers(attention=Attention))


register_train_spec("float64_leak", get_train_spec)
