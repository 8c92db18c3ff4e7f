"""Attention mixes a token with the one before it, which may be on another context rank."""

from __future__ import annotations

import torch.nn.functional as F
from mutants import base

from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("layouts.cp2",)
SAYS = r"layers\.0\.attention.* \(a recurrence, a convolution, a shift\) .* must leave apply_cp out"


class Attention(base.Attention):
    def forward(self, x, positions, mask):
        return super().forward(x + F.pad(x, (0, 0, 1, 0))[:, :-1], positions, mask)


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, model_cls=base.with_layers(attention=Attention))


register_train_spec("shift_under_context_parallel", get_train_spec)
