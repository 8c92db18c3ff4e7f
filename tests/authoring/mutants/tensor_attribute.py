"""A tensor that is a plain attribute stays on the meta device."""

from __future__ import annotations

import torch
from mutants import base

CAUGHT_BY = ("contract.init_weights",)
SAYS = r"layers\.0\.attention\.scale.* is still without memory"


class Attention(base.Attention):
    def __init__(self, args: base.Args) -> None:
        super().__init__(args)
        self.scale = torch.full((), self.head_dim**-0.5)


base.register(__name__, model_cls=base.with_layers(attention=Attention))
