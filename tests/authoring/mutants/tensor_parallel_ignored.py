"""The model takes tensor_parallel_degree and does nothing with it."""

from __future__ import annotations

from mutants import base
from mutants.parallel import parallelize_with

CAUGHT_BY = ("layouts.tp2",)
SAYS = r"tensor_parallel_degree = 2 has no effect"

base.register(__name__, parallelize_fn=parallelize_with(apply_tp=lambda *args: None))
