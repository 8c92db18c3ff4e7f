"""A right model whose layers start as the identity and whose logits start at 0 (muP, speedruns)."""

from __future__ import annotations

import torch.nn as nn
from mutants import base


class Block(base.Block):
    def init_weights(self) -> None:
        super().init_weights()
        nn.init.zeros_(self.attention.wo.weight)
        nn.init.zeros_(self.feed_forward.w2.weight)


class Model(base.Model):
    block_cls = Block

    def init_weights(self) -> None:
        super().init_weights()
        if self.output is not None:
            nn.init.zeros_(self.output.weight)


base.register(__name__, model_cls=Model)
