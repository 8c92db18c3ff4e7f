"""Layers in an nn.ModuleList, which renames those that are left when some are deleted."""

from __future__ import annotations

import torch.nn as nn
from mutants import base

CAUGHT_BY = ("contract.layers",)
SAYS = r"layers is Listed, not nn\.ModuleDict"


class Listed(nn.ModuleList):
    def values(self):
        return iter(self)


class Model(base.Model):
    def __init__(self, args: base.Args) -> None:
        super().__init__(args)
        self.layers = Listed(self.layers.values())


base.register(__name__, model_cls=Model)
