"""Of a model that predicts several tokens, the layers see all tokens, and no positions."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from mutants import multi_token

from torchtitan.models.deepseek_v3 import DeepSeekV3Model

CAUGHT_BY = (
    *("semantics.causality", "semantics.documents", "semantics.positions"),
    "semantics.lengths",
)
SAYS = r"layers\.0: token 0 sees 63 later tokens"


class Everything(nn.Module):
    def forward(self, q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v)


class Model(DeepSeekV3Model):
    def __init__(self, args) -> None:
        super().__init__(args)
        for layer in self.layers.values():
            layer.attention.inner_attention = Everything()

    def rotation(self, positions):
        return super().rotation(torch.arange(positions.shape[1])[None])


multi_token.register("multi_token_layers_mixed", Model)
