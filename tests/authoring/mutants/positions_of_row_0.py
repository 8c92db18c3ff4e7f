"""Queries and keys of all rows are turned by the first one's positions."""

from __future__ import annotations

from mutants import base

from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("semantics.documents",)
SAYS = r"row 2 of a batch, the last document's logits differ.*positions\[0\]"


class Attention(base.Attention):
    def rotate(self, x, positions):
        return super().rotate(x, positions[:1])


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, model_cls=base.with_layers(attention=Attention))


register_train_spec("positions_of_row_0", get_train_spec)
