"""The model takes compile.enable and does nothing with it."""

from __future__ import annotations

from mutants import base
from mutants.parallel import parallelize_with

from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("layouts.compile_aot_eager",)
SAYS = r"compile\.enable has no effect"


def get_train_spec(flavor: str) -> TrainSpec:
    parallelize = parallelize_with(apply_compile=lambda model, job_config: model)
    return base.get_train_spec(flavor, parallelize_fn=parallelize)


register_train_spec("compile_ignored", get_train_spec)
