"""A mask whose diagonal is one too high: every token sees the next one."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from mutants import base

CAUGHT_BY = ("semantics.causality",)
SAYS = r"layers\.0: token 0 sees 1 later tokens, 1;.*off by one"


class NextToo(nn.Module):
    def forward(self, q, k, v, mask):
        allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)


class Attention(base.Attention):
    def __init__(self, args: base.Args) -> None:
        super().__init__(args)
        self.inner_attention = NextToo()


base.register(__name__, model_cls=base.with_layers(attention=Attention))
