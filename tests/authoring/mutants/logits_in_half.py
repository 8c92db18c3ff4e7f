"""Logits are cast to float16, in which large ones overflow."""

from __future__ import annotations

from mutants import base

CAUGHT_BY = ("numerics.dtype",)
SAYS = r"with weights in torch\.float32, the logits are torch\.float16"


class Model(base.Model):
    def forward(self, tokens, positions=None, document_ids=None):
        return super().forward(tokens, positions, document_ids).half()


base.register(__name__, model_cls=Model)
