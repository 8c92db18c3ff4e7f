"""Divisors and multiples, for messages that suggest valid values."""

from __future__ import annotations

import math


def divisors(number: int) -> list[int]:
    """Return all divisors of a number above 0, from 1 on."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def nearest_multiples(value: int, unit: int) -> str:
    """Format the multiples of `unit` around `value`, which is not one itself: `96 or 104`."""
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else f"{unit}"
