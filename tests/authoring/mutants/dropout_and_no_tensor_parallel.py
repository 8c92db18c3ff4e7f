"""The model has dropout, of features and of attention, and ignores tensor_parallel_degree."""

from __future__ import annotations

import torch.nn as nn
import torch.nn.functional as F
from mutants import base
from mutants.parallel import parallelize_with

CAUGHT_BY = ("layouts.tp2",)
SAYS = r"tensor_parallel_degree = 2 has no effect"


class Attention(base.Attention):
    def forward(self, x, positions, mask):
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = self.rotate(q, positions), self.rotate(k, positions)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        dropped = 0.1 if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropped, is_causal=True)
        return self.wo(out.transpose(1, 2).flatten(2))


class FeedForward(base.FeedForward):
    def __init__(self, args):
        super().__init__(args)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        return self.dropout(super().forward(x))


base.register(
    __name__,
    model_cls=base.with_layers(attention=Attention, feed_forward=FeedForward),
    parallelize_fn=parallelize_with(apply_tp=lambda *args: None),
)
