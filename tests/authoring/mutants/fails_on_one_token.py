"""Something is divided by seq - 1."""

from __future__ import annotations

import torch
from mutants import base

CAUGHT_BY = ("semantics.lengths",)
SAYS = r"sequences of 1 tokens"


class Attention(base.Attention):
    def forward(self, x, positions, mask):
        share = torch.arange(x.shape[1]) / torch.tensor(x.shape[1] - 1)
        return super().forward(x, positions, mask) + 0 * share[:, None]


base.register(__name__, model_cls=base.with_layers(attention=Attention))
