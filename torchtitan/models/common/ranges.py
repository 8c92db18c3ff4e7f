"""Types of hyperparameters, with the values that `[model.args]` may give them."""

from __future__ import annotations

from typing import Annotated

from torchtitan.config.base import NonNegative, Positive, Range

Size = Annotated[int, Positive]
Count = Annotated[int, NonNegative]
PositiveFloat = Annotated[float, Range(gt=0)]
NonNegativeFloat = Annotated[float, NonNegative]
RopeTheta = Annotated[float, Range(gt=1)]
"""Base of the rotation frequencies, which are its negative powers: at 1, all would be the same."""
