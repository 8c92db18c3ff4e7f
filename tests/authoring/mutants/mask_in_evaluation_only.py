"""In training, each token sees all others."""

from __future__ import annotations

import torch.nn.functional as F
from mutants import base

CAUGHT_BY = ("semantics.causality",)
SAYS = r"layers\.0: in training, token 0 sees 63 later tokens.*look for self\.training"


class InnerAttention(base.ScaledDotProductAttention):
    def forward(self, q, k, v, mask=None):
        if mask is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=not self.training)
        return super().forward(q, k, v, mask)


class Attention(base.Attention):
    def __init__(self, args):
        super().__init__(args)
        self.inner_attention = InnerAttention()


base.register(__name__, model_cls=base.with_layers(attention=Attention))
