"""The model takes activation_checkpoint.mode and does nothing with it."""

from __future__ import annotations

from mutants import base
from mutants.parallel import parallelize_with

from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("layouts.ac_full",)
SAYS = r"activation_checkpoint\.mode = full has no effect"


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, parallelize_fn=parallelize_with(apply_ac=lambda *args: None))


register_train_spec("activation_checkpoint_ignored", get_train_spec)
