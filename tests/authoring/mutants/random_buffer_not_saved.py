"""Random signs of the hidden features are drawn into a buffer that checkpoints leave out."""

from __future__ import annotations

import torch
import torch.nn as nn
from mutants import base

CAUGHT_BY = ("contract.state_dict",)
SAYS = r"its state_dict lacks layers\.0\.attention\.signs"


class Attention(base.Attention):
    def __init__(self, args: base.Args) -> None:
        super().__init__(args)
        self.register_buffer("signs", torch.empty(args.dim), persistent=False)

    def forward(self, x, positions, mask):
        return super().forward(x * self.signs, positions, mask)


class Block(base.Block):
    def init_weights(self) -> None:
        super().init_weights()
        nn.init.normal_(self.attention.signs)


base.register(__name__, model_cls=base.with_layers(attention=Attention, block=Block))
