"""The initial scale depends on how many layers exist, not on how many the model has."""

from __future__ import annotations

import torch.nn as nn
from mutants import base

CAUGHT_BY = ("contract.recursive",)
SAYS = r"layers\.0 alone gets a different layers\.0\.attention\.wo\.weight"


class Model(base.Model):
    def init_weights(self) -> None:
        super().init_weights()
        for layer in self.layers.values():
            nn.init.normal_(layer.attention.wo.weight, std=0.02 / len(self.layers) ** 0.5)


base.register(__name__, model_cls=Model)
