"""Layers keep documents apart, but the block that predicts the token after the next does not."""

from __future__ import annotations

from mutants import multi_token

from torchtitan.models.deepseek_v3 import DeepSeekV3Model

CAUGHT_BY = ("semantics.later_tokens",)
SAYS = r"prediction 1 of the second document of row 0 differs by .*the mask of documents"


class Model(DeepSeekV3Model):
    def attention_inputs(self, positions, document_ids):
        one = super().attention_inputs(positions, None)
        return {**super().attention_inputs(positions, document_ids), "mtp": one["mtp"]}


multi_token.register("multi_token_documents_ignored", Model)
