"""Queries and keys of all rows are turned by the first one's positions."""

from __future__ import annotations

from mutants import base

CAUGHT_BY = ("semantics.documents",)
SAYS = r"row 2 of a batch, the last document's logits differ.*positions\[0\]"


class Attention(base.Attention):
    def rotate(self, x, positions):
        return super().rotate(x, positions[:1])


base.register(__name__, model_cls=base.with_layers(attention=Attention))
