"""In training, the mask knows no documents."""

from __future__ import annotations

from mutants import base

from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("semantics.documents",)
SAYS = r"layers\.0: in training, tokens of the last document of a row see \d+ .*self\.training"


class Model(base.Model):
    def forward(self, tokens, positions=None, document_ids=None):
        return super().forward(tokens, positions, None if self.training else document_ids)


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, model_cls=Model)


register_train_spec("document_mask_in_evaluation_only", get_train_spec)
