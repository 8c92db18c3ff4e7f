"""The output layer has PyTorch's embedding scale: the untrained model is sure of wrong tokens."""

from __future__ import annotations

import torch.nn as nn
from mutants import base

CAUGHT_BY = ("numerics.first_loss",)
SAYS = r"far above log\(vocab_size\)"


class Model(base.Model):
    def init_weights(self) -> None:
        super().init_weights()
        if self.output is not None:
            nn.init.normal_(self.output.weight, std=1.0)


base.register(__name__, model_cls=Model)
