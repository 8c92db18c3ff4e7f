"""The final norm is frozen where the model is sharded."""

from __future__ import annotations

from mutants import base
from mutants.parallel import parallelize_with

from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("layouts.fsdp2",)
SAYS = r"gradient differs is norm\.weight: it gets no gradient"


def apply_fsdp(model, dp_mesh, job_config):
    if model.norm is not None:
        model.norm.requires_grad_(False)
    base.apply_fsdp(model, dp_mesh, job_config)


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, parallelize_fn=parallelize_with(apply_fsdp=apply_fsdp))


register_train_spec("frozen_under_fsdp", get_train_spec)
