"""The model takes tensor_parallel_degree and does nothing with it."""

from __future__ import annotations

from mutants import base
from mutants.parallel import parallelize_with

from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("layouts.tp2",)
SAYS = r"tensor_parallel_degree = 2 has no effect"


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, parallelize_fn=parallelize_with(apply_tp=lambda *args: None))


register_train_spec("tensor_parallel_ignored", get_train_spec)
