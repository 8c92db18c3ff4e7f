"""Attention mixes a token with the one before it, which may be on another context rank."""

from __future__ import annotations

import torch.nn.functional as F
from mutants import base

CAUGHT_BY = ("layouts.cp2",)
SAYS = r"layers\.0\.attention.* \(a recurrence, a convolution, a shift\) .* must leave apply_cp out"


class Attention(base.Attention):
    def forward(self, x, positions, mask):
        return super().forward(x + F.pad(x, (0, 0, 1, 0))[:, :-1], positions, mask)


base.register(__name__, model_cls=base.with_layers(attention=Attention))
