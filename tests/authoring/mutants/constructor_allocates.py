"""The constructor makes a mask on the CPU whatever device the model is built on."""

from __future__ import annotations

import torch
from mutants import base

CAUGHT_BY = ("contract.meta",)
SAYS = r"tensors allocate memory: causal"


class Model(base.Model):
    def __init__(self, args: base.Args) -> None:
        super().__init__(args)
        causal = torch.ones(2048, 2048, dtype=torch.bool, device="cpu").tril()
        self.register_buffer("causal", causal, persistent=False)


base.register(__name__, model_cls=Model)
