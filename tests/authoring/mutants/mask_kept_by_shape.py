"""The mask is kept from one batch to the next, if that has the same shape."""

from __future__ import annotations

from mutants import base

CAUGHT_BY = ("semantics.documents",)
SAYS = r"row 0 of the second batch, the last document sees \d+ tokens.*kept from one call"


class Mask(base.CausalMask):
    kept = None

    def forward(self, seq_len, document_ids, device):
        key = seq_len, document_ids is not None and len(document_ids)
        if self.kept is None or self.kept[0] != key:
            self.kept = key, super().forward(seq_len, document_ids, device)
        return self.kept[1]


class Model(base.Model):
    def __init__(self, args):
        super().__init__(args)
        self.mask = Mask()


base.register(__name__, model_cls=Model)
