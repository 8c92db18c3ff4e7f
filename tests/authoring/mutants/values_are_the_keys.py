"""Of a product that gives queries, keys and values, the slice of the keys is taken twice."""

from __future__ import annotations

import torch.nn as nn
from mutants import base

CAUGHT_BY = ("learning.gradients",)
SAYS = r"layers\.0\.attention\.wqkv\.weight: 64 of 192 rows get no gradient: 128, .*two slices"


class Attention(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.head_dim, self.theta = args.dim // args.n_heads, args.rope_theta
        self.wqkv = nn.Linear(args.dim, 3 * args.dim, bias=False)
        self.wo = nn.Linear(args.dim, args.dim, bias=False)
        self.inner_attention = base.ScaledDotProductAttention()

    def forward(self, x, positions, mask):
        dim = x.shape[-1]
        qkv = self.wqkv(x)
        slices = qkv[..., :dim], qkv[..., dim : 2 * dim], qkv[..., dim : 2 * dim]
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in slices)
        q, k = base.rope(q, positions, self.theta), base.rope(k, positions, self.theta)
        out = self.inner_attention(*(t.transpose(1, 2) for t in (q, k, v)), mask)
        return self.wo(out.transpose(1, 2).flatten(2))


base.register(__name__, model_cls=base.with_layers(attention=Attention), state_dict_adapter=None)
