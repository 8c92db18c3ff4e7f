"""The checkpoint has biases in attention, the model has none."""

from __future__ import annotations

from mutants import base

CAUGHT_BY = ("adapter.hf_names",)
SAYS = r"the files have model\.layers\.0\.self_attn\.\w_proj\.bias"
HF_CONFIG = base.hf_config() | {"attention_bias": True}

base.register(__name__)
