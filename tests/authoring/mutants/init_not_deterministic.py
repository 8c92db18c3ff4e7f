"""Initial queries come from a generator that is seeded by the operating system."""

from __future__ import annotations

import torch
from mutants import base

CAUGHT_BY = ("contract.deterministic",)
SAYS = r"differ in 4 tensors: layers\.0\.attention\.wq\.weight"


class Block(base.Block):
    def init_weights(self) -> None:
        super().init_weights()
        generator = torch.Generator()
        generator.seed()
        self.attention.wq.weight.normal_(std=0.02, generator=generator)


base.register(__name__, model_cls=base.with_layers(block=Block))
