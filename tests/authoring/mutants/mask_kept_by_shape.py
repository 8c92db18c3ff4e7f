"""The mask is kept from one batch to the next, if that has the same shape."""

from __future__ import annotations

from mutants import base

from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("semantics.documents",)
SAYS = r"row 0 of the second batch, the last document sees \d+ tokens.*kept from one call"


class Mask(base.CausalMask):
    kept = None

    def forward(self, seq_len, document_ids, device):
        if document_ids is None:
            return super().forward(seq_len, document_ids, device)
        if self.kept is None or len(self.kept) != len(document_ids):
            self.kept = super().forward(seq_len, document_ids, device)
        return self.kept


class Model(base.Model):
    def __init__(self, args):
        super().__init__(args)
        self.mask = Mask()


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, model_cls=Model)


register_train_spec("mask_kept_by_shape", get_train_spec)
