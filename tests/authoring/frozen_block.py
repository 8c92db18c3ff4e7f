"""A right model that freezes a block of its own and the embedding."""

from __future__ import annotations

from mutants import base

from torchtitan.protocols import TrainSpec, register_train_spec


class Model(base.Model):
    def __init__(self, args: base.Args) -> None:
        super().__init__(args)
        self.tok_embeddings.requires_grad_(False)
        self.layers["1"].requires_grad_(False)


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, model_cls=Model)


register_train_spec("frozen_block", get_train_spec)
