"""All rows of a batch get the mask of the first one's documents."""

from __future__ import annotations

from mutants import base

from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("semantics.documents",)
SAYS = r"layers\.0: in row 1 of a batch, the last document sees \d+ tokens.*document_ids\[0\]"


class Model(base.Model):
    def forward(self, tokens, positions=None, document_ids=None):
        if document_ids is not None:
            document_ids = document_ids[:1]
        return super().forward(tokens, positions, document_ids)


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, model_cls=Model)


register_train_spec("documents_of_row_0", get_train_spec)
