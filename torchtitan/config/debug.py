from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from .base import Range


@dataclass
class Debug:
    """Reproducibility, and runs that only measure speed."""

    seed: Annotated[int, Range(ge=0, lt=2**63)] = 42
    """Seed of the weights, the order of the training data and dropout. The same seed gives the same
    run on every layout. On resume, the data keeps its order whatever the seed is."""
    deterministic: bool = False
    """Use only deterministic kernels (slower); makes runs bitwise reproducible on CUDA."""
    moe_force_load_balance: bool = False
    """Send the tokens to all experts in turn, whatever the router prefers: to measure the speed of
    an even load with initial weights. Such a run learns little."""
