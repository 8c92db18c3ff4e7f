"""A router in which experts choose tokens: whether a token is processed depends on later ones."""

from __future__ import annotations

import torch
from mutants import base

CAUGHT_BY = ("semantics.causality",)
SAYS = r"changes logits of earlier ones .*layers\.\d\.feed_forward.*(capacity|experts choose)"


class FeedForward(base.FeedForward):
    def forward(self, x):
        scores = self.w1(x).mean(-1)  # [batch, seq]
        chosen = scores.topk(x.shape[1] // 2, dim=1).indices
        kept = torch.zeros_like(scores).scatter(1, chosen, 1.0)
        return 20 * super().forward(x) * kept[..., None]


base.register(__name__, model_cls=base.with_layers(feed_forward=FeedForward))
