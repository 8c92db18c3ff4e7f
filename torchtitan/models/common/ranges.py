"""Types of hyperparameters, with the values that `[model.args]` may give them."""

from __future__ import annotations

from typing import Annotated

from torchtitan.config.base import (
    NonNegative,
    NonNegativeInKernels,
    Positive,
    PositiveInKernels,
    Range,
)

Size = Annotated[int, Positive]
Count = Annotated[int, NonNegative]
PositiveFloat = Annotated[float, PositiveInKernels]
NonNegativeFloat = Annotated[float, NonNegativeInKernels]
RopeTheta = Annotated[float, Range(gt=1)]
"""Base of the rotation frequencies, which are its negative powers: at 1, all would be the same."""
