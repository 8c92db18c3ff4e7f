"""Attention views its features as all heads; a rank of tensor parallelism has a part."""

from __future__ import annotations

from mutants import base

CAUGHT_BY = (
    "layouts.tp2",
    "layouts.tp2_whole_sequence",
)
SAYS = r"RuntimeError.*heads_of_all_ranks\.py:\d+ in"
CRASHES = True


class Attention(base.Attention):
    def __init__(self, args):
        super().__init__(args)
        self.n_heads = args.n_heads

    def forward(self, x, positions, mask):
        shape = (*x.shape[:2], self.n_heads, self.head_dim)
        q, k, v = (w(x).view(shape) for w in (self.wq, self.wk, self.wv))
        q, k = self.rotate(q, positions), self.rotate(k, positions)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return self.wo(self.inner_attention(q, k, v, mask).transpose(1, 2).flatten(2))


base.register(__name__, model_cls=base.with_layers(attention=Attention))
