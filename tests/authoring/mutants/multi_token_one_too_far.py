"""The block that predicts the token after the next is given it."""

from __future__ import annotations

from mutants import multi_token

from torchtitan.models.deepseek_v3 import DeepSeekV3Model

CAUGHT_BY = ("semantics.later_tokens",)
SAYS = r"^prediction 1 at places before 31 sees tokens from 32 on"


class Model(DeepSeekV3Model):
    def forward(self, tokens, positions=None, document_ids=None, next_tokens=None):
        later = None if next_tokens is None else next_tokens.roll(-1, 1)
        return super().forward(tokens, positions, document_ids, later)


multi_token.register("multi_token_one_too_far", Model)
