"""The first token of a shift is in new memory that nothing writes."""

from __future__ import annotations

import torch
from mutants import base

CAUGHT_BY = ("semantics.repeatable",)
SAYS = r"forward\(\) reads memory that nothing has written; .* shows it is layers\.0"


class Block(base.Block):
    def forward(self, x, positions, mask):
        x = super().forward(x, positions, mask)
        before = torch.empty_like(x)
        before[:, 1:] = x[:, :-1]
        return x + before


base.register(__name__, model_cls=base.with_layers(block=Block))
