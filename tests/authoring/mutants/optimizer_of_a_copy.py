"""The optimizer has the parameters of a copy of the model."""

from __future__ import annotations

import copy

from mutants import base

from torchtitan.components import build_optimizer
from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("learning.training",)
SAYS = r"in 20 steps of training the loss went from"


def build_optimizer_of_a_copy(model_parts, job_config, parallel_dims):
    return build_optimizer(copy.deepcopy(model_parts), job_config, parallel_dims)


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, build_optimizer_fn=build_optimizer_of_a_copy)


register_train_spec("optimizer_of_a_copy", get_train_spec)
