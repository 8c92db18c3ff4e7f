"""Queries and keys are not rotated."""

from __future__ import annotations

from mutants import base

from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("semantics.order", "semantics.positions")
SAYS = r"in no layer does the order of earlier tokens matter .* rope_theta"


class Attention(base.Attention):
    def rotate(self, x, positions):
        return x


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, model_cls=base.with_layers(attention=Attention))


register_train_spec("positions_ignored", get_train_spec)
