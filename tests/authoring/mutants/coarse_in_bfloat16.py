"""A mean of squares is accumulated one by one in the dtype of the features."""

from __future__ import annotations

import torch.nn as nn
from mutants import base

CAUGHT_BY = ("numerics.bf16",)
SAYS = r"first module that differs so much is layers\.0\.attention_norm"


class CoarseNorm(nn.RMSNorm):
    def forward(self, x):
        square = (x.to(self.weight.dtype) ** 2).cumsum(-1, dtype=self.weight.dtype)[..., -1:]
        large = (square + 256.0) - 256.0  # bfloat16 has 8 bits
        return x * (large / x.shape[-1] + 1e-5).rsqrt() * self.weight


class Block(base.Block):
    def __init__(self, args: base.Args) -> None:
        super().__init__(args)
        self.attention_norm = CoarseNorm(args.dim)


base.register(__name__, model_cls=base.with_layers(block=Block))
