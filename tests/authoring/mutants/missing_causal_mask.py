"""Attention without a mask: every token sees the later ones, which it is to predict."""

from __future__ import annotations

import torch.nn as nn
import torch.nn.functional as F
from mutants import base

CAUGHT_BY = ("semantics.causality",)
SAYS = r"layers\.0: token 0 sees 63 later tokens"


class Unmasked(nn.Module):
    def forward(self, q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v)


class Attention(base.Attention):
    def __init__(self, args: base.Args) -> None:
        super().__init__(args)
        self.inner_attention = Unmasked()


base.register(__name__, model_cls=base.with_layers(attention=Attention))
