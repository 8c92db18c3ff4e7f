"""The range annotation of config fields, which the loader checks."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """Bounds of a number: `Annotated[int, Range(ge=1)]`. Values in `special` are allowed too.

    Infinity and NaN are outside every range unless they are in `special`.
    """

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    special: tuple[float, ...] = ()

    def allows(self, value: float) -> bool:
        if value in self.special:
            return True
        return not (
            not math.isfinite(value)
            or (self.ge is not None and value < self.ge)
            or (self.gt is not None and value <= self.gt)
            or (self.le is not None and value > self.le)
            or (self.lt is not None and value >= self.lt)
        )

    def __str__(self) -> str:
        signs = {">=": self.ge, ">": self.gt, "<=": self.le, "<": self.lt}
        bounds = " and ".join(f"{sign} {_shown(b)}" for sign, b in signs.items() if b is not None)
        return " or ".join([bounds, *map(_shown, self.special)])


def _shown(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


Positive = Range(ge=1)
NonNegative = Range(ge=0)
Amount = Range(ge=1, le=2**31 - 1)
"""Of tokens and sequences, whose numbers have 32 bits."""
PositiveInKernels = Range(gt=0, le=1e30)
"""Kernels refuse numbers beyond float32, also as the product of two options."""
NonNegativeInKernels = Range(ge=0, le=1e30)
