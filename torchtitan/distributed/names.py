"""Parameter names as they stand in checkpoints and in `optimizer.rules`."""

from __future__ import annotations

_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
"""Modules that torch puts around another: torch.compile, activation checkpointing, FSDP1."""


def canonical_name(fqn: str) -> str:
    """The name that a parameter has in the bare model: `_orig_mod.norm.weight` -> `norm.weight`."""
    return ".".join(part for part in fqn.split(".") if part not in _WRAPPERS)
