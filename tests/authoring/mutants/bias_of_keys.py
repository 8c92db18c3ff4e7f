"""A bias of the keys, which adds the same to all scores of a query: only rounding moves it."""

from __future__ import annotations

import torch
import torch.nn as nn
from mutants import base

CAUGHT_BY = ("learning.gradients",)
SAYS = r"4 of 43 parameters get no gradient: .*attention\.bias.* softmax .* freeze them"


class Attention(base.Attention):
    def __init__(self, args):
        super().__init__(args)
        self.bias = nn.Parameter(torch.empty(args.dim))

    def reset_parameters(self):
        nn.init.zeros_(self.bias)

    def forward(self, x, positions, mask):
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = self.rotate(q, positions), self.rotate(k, positions)
        k = k + 1e-3 * self.bias.view(-1, self.head_dim)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return self.wo(self.inner_attention(q, k, v, mask).transpose(1, 2).flatten(2))


base.register(__name__, model_cls=base.with_layers(attention=Attention))
