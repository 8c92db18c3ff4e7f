"""A norm stays out of the plan, so its weight's gradient is of the rank's part of the sequence."""

from __future__ import annotations

from mutants import base
from mutants.parallel import parallelize_with, with_plan

CAUGHT_BY = (
    "layouts.tp2",
    "layouts.fsdp2_tp2",
)
SAYS = r"gradient differs is layers\.3\.ffn_norm\.weight.*SequenceParallel"


apply_tp = with_plan(ffn_norm=None)

base.register(__name__, parallelize_fn=parallelize_with(apply_tp=apply_tp))
