"""A norm divides by the mean square over the whole batch."""

from __future__ import annotations

import torch.nn as nn
from mutants import base

CAUGHT_BY = ("semantics.batch",)
SAYS = r"layers\.0: a sequence of a batch sees the others"


class BatchNorm(nn.RMSNorm):
    def forward(self, x):
        return x * (x.square().mean(dim=(0, 2), keepdim=True) + 1e-5).rsqrt() * self.weight


class Block(base.Block):
    def __init__(self, args: base.Args) -> None:
        super().__init__(args)
        self.ffn_norm = BatchNorm(args.dim)


base.register(__name__, model_cls=base.with_layers(block=Block))
