"""A softmax without subtracting the largest score, which overflows as training enlarges weights."""

from __future__ import annotations

from mutants import base

CAUGHT_BY = ("numerics.large_weights",)
SAYS = (
    r"32 times as large in float32, the output of layers\.0\..* not finite.*subtracting the largest"
)


class Attention(base.Attention):
    def forward(self, x, positions, mask):
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = self.rotate(q, positions).transpose(1, 2), self.rotate(k, positions).transpose(1, 2)
        weights = (q @ k.transpose(2, 3) * self.head_dim**-0.5).exp().tril()
        out = weights / weights.sum(-1, keepdim=True) @ v.transpose(1, 2)
        return self.wo(out.transpose(1, 2).flatten(2))


base.register(__name__, model_cls=base.with_layers(Attention))
