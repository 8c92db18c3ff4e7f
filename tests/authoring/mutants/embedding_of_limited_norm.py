"""The embedding limits the norm of its rows in place, which FSDP does not keep."""

from __future__ import annotations

import torch.nn as nn
from mutants import base

CAUGHT_BY = ("semantics.repeatable", "layouts.fsdp2")
SAYS = r"forward\(\) changes 1 parameters in place: tok_embeddings\.weight.*max_norm"


class Model(base.Model):
    def __init__(self, args: base.Args) -> None:
        super().__init__(args)
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim, max_norm=0.1)


base.register(__name__, model_cls=Model)
