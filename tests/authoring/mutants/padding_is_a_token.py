"""A row of the embedding is taken for padding, and is never trained."""

from __future__ import annotations

import torch.nn as nn
from mutants import base

CAUGHT_BY = ("learning.gradients",)
SAYS = r"tok_embeddings\.weight: 1 of 264 rows get no gradient: 0 .*padding_idx=0"


class Model(base.Model):
    def __init__(self, args):
        super().__init__(args)
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim, padding_idx=0)


base.register(__name__, model_cls=Model)
