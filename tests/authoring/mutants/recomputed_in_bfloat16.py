"""Blocks are recomputed in another precision than they were computed in."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import torch
from mutants import base
from mutants.parallel import parallelize_with
from torch.utils.checkpoint import checkpoint

from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("layouts.ac_full",)
SAYS = r"recomputed in the backward pass, layers\.0\.attention"


def apply_ac(model, job_config):
    if job_config.activation_checkpoint.mode == "none":
        return
    for layer in model.layers.values():
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, context_fn=in_bfloat16
        )


def in_bfloat16():
    return nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, parallelize_fn=parallelize_with(apply_ac=apply_ac))


register_train_spec("recomputed_in_bfloat16", get_train_spec)
