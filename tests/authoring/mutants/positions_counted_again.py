"""forward takes positions, and counts its own."""

from __future__ import annotations

import torch
from mutants import base

CAUGHT_BY = ("semantics.positions",)
SAYS = r"positions in the reverse order change no logit"


class Attention(base.Attention):
    def rotate(self, x, positions):
        return super().rotate(x, torch.arange(x.shape[1])[None])


base.register(__name__, model_cls=base.with_layers(attention=Attention))
