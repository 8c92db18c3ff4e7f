"""The optimizer has no parameters of one dimension."""

from __future__ import annotations

from mutants import base

from torchtitan.components import build_optimizer
from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("layouts.updates",)
SAYS = r"9 of 39 parameters have a gradient.*layers\.0\.attention_norm\.weight"


def build_optimizer_of_matrices(model_parts, job_config, parallel_dims):
    optimizers = build_optimizer(model_parts, job_config, parallel_dims)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p.ndim > 1]
    return optimizers


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, build_optimizer_fn=build_optimizer_of_matrices)


register_train_spec("optimizer_leaves_out_norms", get_train_spec)
