"""forward takes document_ids and does not use them."""

from __future__ import annotations

from mutants import base

CAUGHT_BY = ("semantics.documents",)
SAYS = r"layers\.0: tokens of the second document, from 21 on, see 21 tokens of the first"


class Model(base.Model):
    def forward(self, tokens, positions=None, document_ids=None):
        return super().forward(tokens, positions)


base.register(__name__, model_cls=Model)
