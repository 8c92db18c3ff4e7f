"""A row of the embedding is taken for padding, and is never trained."""

from __future__ import annotations

import torch.nn as nn
from mutants import base

from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("learning.gradients",)
SAYS = r"tok_embeddings\.weight: 1 of 264 rows get no gradient: 0 .*padding_idx=0"


class Model(base.Model):
    def __init__(self, args):
        super().__init__(args)
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim, padding_idx=0)


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, model_cls=Model)


register_train_spec("padding_is_a_token", get_train_spec)
