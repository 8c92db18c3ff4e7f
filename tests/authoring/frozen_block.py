"""A right model that freezes a block of its own and the embedding."""

from __future__ import annotations

from mutants import base


class Model(base.Model):
    def __init__(self, args: base.Args) -> None:
        super().__init__(args)
        self.tok_embeddings.requires_grad_(False)
        self.layers["1"].requires_grad_(False)


base.register(__name__, model_cls=Model)
