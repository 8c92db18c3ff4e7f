"""In training, the mask knows no documents."""

from __future__ import annotations

from mutants import base

CAUGHT_BY = ("semantics.documents",)
SAYS = r"layers\.0: in training, tokens of the last document of a row see \d+ .*self\.training"


class Model(base.Model):
    def forward(self, tokens, positions=None, document_ids=None):
        return super().forward(tokens, positions, None if self.training else document_ids)


base.register(__name__, model_cls=Model)
