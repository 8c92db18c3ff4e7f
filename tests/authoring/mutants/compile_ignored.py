"""The model takes compile.enable and does nothing with it."""

from __future__ import annotations

from mutants import base
from mutants.parallel import parallelize_with

CAUGHT_BY = ("layouts.compile_aot_eager",)
SAYS = r"compile\.enable has no effect"


parallelize = parallelize_with(apply_compile=lambda model, job_config: model)
base.register(__name__, parallelize_fn=parallelize)
