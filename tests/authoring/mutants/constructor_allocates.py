"""The constructor makes a mask on the CPU whatever device the model is built on."""

from __future__ import annotations

import torch
from mutants import base

from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("contract.meta",)
SAYS = r"tensors allocate memory: causal"


class Model(base.Model):
    def __init__(self, args: base.Args) -> None:
        super().__init__(args)
        causal = torch.ones(2048, 2048, dtype=torch.bool, device="cpu").tril()
        self.register_buffer("causal", causal, persistent=False)


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, model_cls=Model)


register_train_spec("constructor_allocates", get_train_spec)
