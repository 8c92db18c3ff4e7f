"""The block that predicts the token after the next attends to all tokens, in training."""

from __future__ import annotations

import torch.nn as nn
import torch.nn.functional as F
from mutants import multi_token

from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.deepseek_v3 import DeepSeekV3Model

CAUGHT_BY = ("semantics.later_tokens",)
SAYS = r"in training, prediction 1 at places before 31 .*first module that differs is mtp\.0\."


class Everything(nn.Module):
    def __init__(self, right: ScaledDotProductAttention) -> None:
        super().__init__()
        self.right = right

    def forward(self, q, k, v, mask):
        return (
            F.scaled_dot_product_attention(q, k, v) if self.training else self.right(q, k, v, mask)
        )


class Model(DeepSeekV3Model):
    def __init__(self, args) -> None:
        super().__init__(args)
        for block in self.mtp:
            block.attention.inner_attention = Everything(block.attention.inner_attention)


multi_token.register("multi_token_not_causal", Model)
