"""The embedding limits the norm of its rows in place, which FSDP does not keep."""

from __future__ import annotations

import torch.nn as nn
from mutants import base

from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("semantics.repeatable", "layouts.fsdp2")
SAYS = r"forward\(\) changes 1 parameters in place: tok_embeddings\.weight.*max_norm"


class Model(base.Model):
    def __init__(self, args: base.Args) -> None:
        super().__init__(args)
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim, max_norm=0.1)


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, model_cls=Model)


register_train_spec("embedding_of_limited_norm", get_train_spec)
