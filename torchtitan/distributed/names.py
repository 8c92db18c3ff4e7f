"""Parameter names as used in checkpoints and in `optimizer.rules`."""

from __future__ import annotations

import re

import torch.nn as nn

from torchtitan.config import JobConfig
from torchtitan.config.load import fail

_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
"""Wrapper modules of torch: torch.compile, activation checkpointing, FSDP1."""


def canonical_name(fqn: str) -> str:
    """Return a parameter's name in the bare model: `_orig_mod.norm.weight` -> `norm.weight`."""
    return ".".join(part for part in fqn.split(".") if part not in _WRAPPERS)


def require_match(pattern: str, model: nn.Module, job_config: JobConfig, key: str) -> None:
    """Raise `ConfigError` if the pattern, of config key `key`, matches no parameter of the model.

    `model` is the whole model.
    """
    names = [canonical_name(fqn) for fqn, _ in model.named_parameters()]
    if not any(re.search(pattern, name) for name in names):
        some = ", ".join(names[:: max(1, len(names) // 5)][:5])
        problem = f"pattern {pattern!r} matches no parameter. Some of their names: {some}"
        fail(job_config, key, problem)
