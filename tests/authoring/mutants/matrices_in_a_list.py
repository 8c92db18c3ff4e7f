"""A matrix in a Python list, which PyTorch does not see: it is neither moved nor trained."""

from __future__ import annotations

import torch.nn as nn
import torch.nn.functional as F
from mutants import base

CAUGHT_BY = ("contract.init_weights",)
SAYS = r"layers\.0\.feed_forward\.up\.weight, .* still without memory.*nn\.ModuleList"


class FeedForward(base.FeedForward):
    def __init__(self, args: base.Args) -> None:
        super().__init__(args)
        self.up = [nn.Linear(args.dim, args.ffn_dim, bias=False)]
        del self.w3

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.up[0](x))


base.register(__name__, model_cls=base.with_layers(feed_forward=FeedForward))
