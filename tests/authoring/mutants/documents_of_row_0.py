"""All rows of a batch get the mask of the first one's documents."""

from __future__ import annotations

from mutants import base

CAUGHT_BY = ("semantics.documents",)
SAYS = r"layers\.0: in row 1 of a batch, the last document sees \d+ tokens.*document_ids\[0\]"


class Model(base.Model):
    def forward(self, tokens, positions=None, document_ids=None):
        if document_ids is not None:
            document_ids = document_ids[:1]
        return super().forward(tokens, positions, document_ids)


base.register(__name__, model_cls=Model)
