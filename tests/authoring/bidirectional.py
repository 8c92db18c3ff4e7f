"""A right model whose tokens see later ones, and which says so; also one that does not say it."""

from __future__ import annotations

import torch.nn.functional as F
from mutants import base


class Attention(base.Attention):
    def forward(self, x, positions, mask):
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = self.rotate(q, positions), self.rotate(k, positions)
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        return self.wo(out.transpose(1, 2).flatten(2))


class Model(base.with_layers(attention=Attention)):
    sees_later_tokens = True

    def forward(self, tokens, positions=None):
        return super().forward(tokens, positions)


class Silent(Model):
    sees_later_tokens = False


base.register("bidirectional", model_cls=Model, state_dict_adapter=None)
base.register("bidirectional_silent", model_cls=Silent, state_dict_adapter=None)
