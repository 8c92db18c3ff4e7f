"""The optimizer has no parameters of one dimension."""

from __future__ import annotations

from mutants import base

from torchtitan.components import build_optimizer

CAUGHT_BY = ("layouts.updates",)
SAYS = r"9 of 39 parameters have a gradient.*layers\.0\.attention_norm\.weight"


def build_optimizer_of_matrices(model_parts, job_config, parallel_dims):
    optimizers = build_optimizer(model_parts, job_config, parallel_dims)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p.ndim > 1]
    return optimizers


base.register(__name__, build_optimizer_fn=build_optimizer_of_matrices)
