"""The model takes activation_checkpoint.mode and does nothing with it."""

from __future__ import annotations

from mutants import base
from mutants.parallel import parallelize_with

CAUGHT_BY = ("layouts.ac_full",)
SAYS = r"activation_checkpoint\.mode = full has no effect"

base.register(__name__, parallelize_fn=parallelize_with(apply_ac=lambda *args: None))
