"""forward takes positions, and counts its own."""

from __future__ import annotations

import torch
from mutants import base

from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("semantics.positions",)
SAYS = r"positions in the reverse order change no logit"


class Attention(base.Attention):
    def rotate(self, x, positions):
        return super().rotate(x, torch.arange(x.shape[1])[None])


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, model_cls=base.with_layers(attention=Attention))


register_train_spec("positions_counted_again", get_train_spec)
