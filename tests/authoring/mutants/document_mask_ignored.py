"""forward takes document_ids and does not use them."""

from __future__ import annotations

from mutants import base

from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("semantics.documents",)
SAYS = r"layers\.0: tokens of the second document, from 21 on, see 21 tokens of the first"


class Model(base.Model):
    def forward(self, tokens, positions=None, document_ids=None):
        return super().forward(tokens, positions)


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, model_cls=Model)


register_train_spec("document_mask_ignored", get_train_spec)
