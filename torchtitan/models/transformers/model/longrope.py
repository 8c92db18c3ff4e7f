"""`longrope`: short sequences are rotated by other factors than long ones.

transformers chooses by the longest position of a batch, which ranks do not share, and at which
packed documents begin anew. Here a job chooses once, by `training.seq_len`.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch.nn as nn

from torchtitan.config import JobConfig, fail

_SHORT, _LONG = ("short factors of longrope", "long factors of longrope")
"""Names of rotations that transformers does not change."""


def limit_of_short_rotations(hf_config: Any) -> int | None:
    """Return the longest sequence that is rotated by the short factors; None: all are alike."""
    rope = getattr(hf_config, "rope_parameters", None) or {}
    is_used = rope.get("rope_type") == "longrope"
    return rope["original_max_position_embeddings"] if is_used else None


def long_rotations(hf_config: Any, job_config: JobConfig) -> bool:
    """Whether the sequences of a job are long.

    Raises:
        ConfigError: those of training and validation are not alike in this.
    """
    if (limit := limit_of_short_rotations(hf_config)) is None:
        return False
    seq_len, validation = job_config.training.seq_len, job_config.validation
    is_long = seq_len > limit
    if validation.enable and ((validation.seq_len or seq_len) > limit) != is_long:
        fail(
            job_config,
            "validation.seq_len",
            f"longrope rotates sequences of up to {limit} tokens otherwise than longer ones, so "
            f"both this and training.seq_len = {seq_len} must be "
            f"{'above' if is_long else 'at most'} {limit}",
        )
    return is_long


def fix_rotations(model: nn.Module, long: bool) -> None:
    """Let modules with `longrope` use the same factors in each forward pass."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS as FUNCTIONS

    FUNCTIONS[_SHORT] = FUNCTIONS["longrope"]
    FUNCTIONS[_LONG] = partial(FUNCTIONS["longrope"], seq_len=sys.maxsize)
    modules: list[Any] = list(model.modules())
    for module in modules:
        if getattr(module, "rope_type", None) == "longrope":
            module.rope_type = _LONG if long else _SHORT
