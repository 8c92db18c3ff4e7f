"""A table of rotary angles is computed in the constructor, on the meta device, and so is lost."""

from __future__ import annotations

import torch
from mutants import base

CAUGHT_BY = ("contract.init_weights",)
SAYS = r"leaves 4 tensors unset: layers\.0\.attention\.angles"


class Attention(base.Attention):
    def __init__(self, args: base.Args) -> None:
        super().__init__(args)
        angles = torch.outer(torch.arange(4096.0), torch.ones(self.head_dim // 2))
        self.register_buffer("angles", angles, persistent=False)


base.register(__name__, model_cls=base.with_layers(attention=Attention))
