"""init_weights puts a new tensor in the place of a buffer: on a GPU, it is on the CPU."""

from __future__ import annotations

import torch
from mutants import base

CAUGHT_BY = ("contract.device",)
SAYS = r"after init_weights\(\), layers\.0\.attention\.scale is on the CPU"


class Attention(base.Attention):
    def __init__(self, args: base.Args) -> None:
        super().__init__(args)
        self.register_buffer("scale", torch.empty(args.dim), persistent=False)

    def forward(self, x, positions, mask):
        return super().forward(x * self.scale, positions, mask)


class Block(base.Block):
    def init_weights(self) -> None:
        super().init_weights()
        self.attention.scale = torch.ones(self.attention.wq.in_features)


base.register(__name__, model_cls=base.with_layers(Attention, block=Block))
