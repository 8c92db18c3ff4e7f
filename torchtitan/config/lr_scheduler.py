from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from .base import NonNegative, Positive, Range


@dataclass
class LRScheduler:
    """Learning rate over the run: warm-up, stable, decay."""

    warmup_steps: Annotated[int, NonNegative] = 200
    """Steps of linear warm-up."""
    total_steps: Annotated[int, Positive] | None = None
    """Steps that the schedule spans; unset: `training.steps`. Set it so that a trial of a few
    steps, or a run that ends early, has the learning rates of the full run."""
    decay_ratio: Annotated[float, Range(ge=0, le=1)] | None = None
    """Share of the steps spent decaying at the end; unset: decay from the end of the warm-up."""
    decay_type: Literal["linear", "cosine", "sqrt"] = "linear"
    """Shape of the decay."""
    min_lr_factor: Annotated[float, Range(ge=0, le=1)] = 0.0
    """Learning rate at the end, as a factor of the peak."""
