"""A right model whose layers start as the identity and whose logits start at 0 (muP, speedruns)."""

from __future__ import annotations

import torch.nn as nn
from mutants import base

from torchtitan.protocols import TrainSpec, register_train_spec


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


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, model_cls=Model)


register_train_spec("starts_at_zero", get_train_spec)
