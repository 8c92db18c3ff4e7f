from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from .base import Range


@dataclass
class ActivationCheckpoint:
    """Trade compute for memory: recompute activations in the backward pass."""

    mode: Literal["none", "full", "selective", "memory_budget"] = "selective"
    """`full` recomputes every block, `selective` by `selective_ac_option`, `memory_budget` lets
    the compiler choose (needs `compile.enable`)."""
    selective_ac_option: str = "op"
    """`op`: keep attention, reduce-scatters and every other matrix product, and recompute the
    rest. N: each N-th block, whole."""
    memory_budget: Annotated[float, Range(ge=0, le=1)] = 0.5
    """Share of activation memory kept under `memory_budget`: 0 is like full, 1 like none."""
