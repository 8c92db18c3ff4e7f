"""Layers numbered from 1."""

from __future__ import annotations

import torch.nn as nn
from mutants import base

CAUGHT_BY = ("contract.layers",)
SAYS = r"has the keys 1, 2, 3, 4, not 0, 1, 2, 3"


class Model(base.Model):
    def __init__(self, args: base.Args) -> None:
        super().__init__(args)
        layers = enumerate(self.layers.values(), start=1)
        self.layers = nn.ModuleDict({str(number): layer for number, layer in layers})


base.register(__name__, model_cls=Model)
