"""forward takes document_ids and does not use them."""

from __future__ import annotations

from mutants import base

CAUGHT_BY = ("semantics.documents",)
SAYS = r"layers\.0: in row 0 of a batch, the last document sees 50 tokens .* The mask must hold"


class Model(base.Model):
    def forward(self, tokens, positions=None, document_ids=None):
        return super().forward(tokens, positions)


base.register(__name__, model_cls=Model)
