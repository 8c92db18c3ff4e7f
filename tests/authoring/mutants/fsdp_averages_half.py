"""A block's gradients are averaged over the data ranks where the trainer needs their sum."""

from __future__ import annotations

from mutants import base
from mutants.parallel import parallelize_with

from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("layouts.fsdp2",)
SAYS = r"gradient differs is layers\.2\."


def apply_fsdp(model, dp_mesh, job_config):
    base.apply_fsdp(model, dp_mesh, job_config)
    for param in model.layers["2"].parameters() if "2" in model.layers else ():
        param.register_hook(lambda grad: grad / 2)


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, parallelize_fn=parallelize_with(apply_fsdp=apply_fsdp))


register_train_spec("fsdp_averages_half", get_train_spec)
