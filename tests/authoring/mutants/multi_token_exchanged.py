"""The predictions are stacked in the wrong order: the one of the next token is given it."""

from __future__ import annotations

from mutants import multi_token

from torchtitan.models.deepseek_v3 import DeepSeekV3Model

CAUGHT_BY = ("semantics.later_tokens",)
SAYS = r"^prediction 0 at places before 32 sees tokens from 32 on"


class Model(DeepSeekV3Model):
    def forward(self, tokens, positions=None, document_ids=None, next_tokens=None):
        logits = super().forward(tokens, positions, document_ids, next_tokens)
        return logits if next_tokens is None else logits.flip(2)


multi_token.register("multi_token_exchanged", Model)
