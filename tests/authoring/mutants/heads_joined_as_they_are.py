"""The heads' results are joined without transpose(1, 2), which mixes tokens."""

from __future__ import annotations

from mutants import base

CAUGHT_BY = ("semantics.causality",)
SAYS = r"layers\.0: token 0 sees 3 later tokens, .*heads that are joined without transpose\(1, 2\)"


class Attention(base.Attention):
    def forward(self, x, positions, mask):
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = self.rotate(q, positions), self.rotate(k, positions)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return self.wo(self.inner_attention(q, k, v, mask).reshape(*x.shape[:2], -1))


base.register(__name__, model_cls=base.with_layers(Attention))
