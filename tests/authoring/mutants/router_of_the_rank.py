"""The router scores experts against the other tokens of the rank, not each token by itself."""

from __future__ import annotations

from dataclasses import replace

import torch

from torchtitan.models import qwen3
from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("layouts.ep2", "layouts.accumulation")
SAYS = r"first module whose output differs is layers\.\d+\.moe"


class Model(qwen3.Qwen3Model):
    def __init__(self, args):
        super().__init__(args)
        for layer in self.layers.values():
            layer.moe.router.register_forward_hook(scale_by_batch)


def scale_by_batch(router, inputs, outputs):
    weights, *rest = outputs
    if not torch.is_floating_point(weights):
        raise TypeError("the router's first output has changed")
    return (weights / weights.max(), *rest)


def get_train_spec(flavor: str) -> TrainSpec:
    return replace(qwen3.get_train_spec("debugmodel_moe"), model_cls=Model)


register_train_spec("router_of_the_rank", get_train_spec)
