"""The checkpoint has biases in attention, the model has none."""

from __future__ import annotations

from mutants import base

from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("adapter.hf_names",)
SAYS = r"the files have model\.layers\.0\.self_attn\.\w_proj\.bias"
HF_CONFIG = base.hf_config() | {"attention_bias": True}


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor)


register_train_spec("bias_dropped", get_train_spec)
