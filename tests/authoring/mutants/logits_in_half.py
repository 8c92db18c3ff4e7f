"""Logits are cast to float16, in which large ones overflow."""

from __future__ import annotations

from mutants import base

from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("numerics.dtype",)
SAYS = r"with weights in torch\.float32, the logits are torch\.float16"


class Model(base.Model):
    def forward(self, tokens, positions=None, document_ids=None):
        return super().forward(tokens, positions, document_ids).half()


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, model_cls=Model)


register_train_spec("logits_in_half", get_train_spec)
