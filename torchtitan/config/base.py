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
        bounds = " and ".join(f"{sign} {b:g}" for sign, b in signs.items() if b is not None)
        return " or ".join([bounds, *(f"{s:g}" for s in self.special)])


Positive = Range(ge=1)
NonNegative = Range(ge=0)
