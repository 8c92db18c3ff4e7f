"""Attention without a mask, in layers whose output projections start at 0."""

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
    def __init__(self, args):
        super().__init__(args)
        self.inner_attention = Unmasked()


class Block(base.Block):
    def init_weights(self):
        super().init_weights()
        nn.init.zeros_(self.attention.wo.weight)
        nn.init.zeros_(self.feed_forward.w2.weight)


base.register(__name__, model_cls=base.with_layers(attention=Attention, block=Block))
