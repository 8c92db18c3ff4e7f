"""The optimizer loads nothing on resume, so its moments begin at zero."""

from __future__ import annotations

import copy

from mutants import base

from torchtitan.components import build_optimizer

CAUGHT_BY = ("checkpoints.resume",)
SAYS = r"after a resume, the (weight|state) .* differs"


def build(model_parts, job_config, parallel_dims):
    optimizers = build_optimizer(model_parts, job_config, parallel_dims)
    optimizers.load_state_dict = lambda state_dict: None
    state_dict = optimizers.state_dict
    optimizers.state_dict = lambda: copy.deepcopy(state_dict())  # loading is done in place
    return optimizers


base.register(__name__, build_optimizer_fn=build)
