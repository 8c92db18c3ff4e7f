"""The optimizer has the parameters of a copy of the model."""

from __future__ import annotations

import copy

from mutants import base

from torchtitan.components import build_optimizer

CAUGHT_BY = ("learning.training",)
SAYS = r"in 20 steps of training the loss went from"


def build_optimizer_of_a_copy(model_parts, job_config, parallel_dims):
    return build_optimizer(copy.deepcopy(model_parts), job_config, parallel_dims)


base.register(__name__, build_optimizer_fn=build_optimizer_of_a_copy)
