"""Weights are copied from torch.randn, which belongs to no parameter: it depends on what is drawn
before."""

from __future__ import annotations

import torch
from mutants import base

CAUGHT_BY = ("contract.recursive",)
SAYS = r"layers\.3 alone gets a different layers\.3\.attention\.wq\.weight"


class Block(base.Block):
    def init_weights(self) -> None:
        wq = self.attention.wq.weight
        wq.copy_(0.02 * torch.randn(wq.shape))
        kept = wq.clone()
        super().init_weights()
        wq.copy_(kept)


base.register(__name__, model_cls=base.with_layers(block=Block))
