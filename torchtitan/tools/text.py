"""Formats numbers and short texts for people."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters except tabs and line ends, and lone surrogates, which have no UTF-8."""


def human(number: float, space: str = " ") -> str:
    """Format with three significant digits and a unit: 8030261248 -> `8.03 B`."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= 0.9995 * size:
            return f"{three_digits(number / size)}{space}{unit}"
    return three_digits(number)


def human_bytes(number: float) -> str:
    """Format bytes: `512 B`, `8.19 kB`, `2.28 GB`."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= 0.9995 * size:
            return f"{three_digits(number / size)} {unit}"
    return f"{number:.0f} B"


def three_digits(number: float) -> str:
    """Format `0.0123`, `0.512`, `1.23`, `12.3`, `123`, `1234`, `1.23e-7`, `nan` or `inf`."""
    if not math.isfinite(number) or number == 0:
        return f"{number:g}"
    if not 1e-4 <= abs(number) < 1e6:
        return scientific(number)
    decimals = 2 - math.floor(math.log10(abs(float(f"{number:.2e}"))))
    return f"{number:.{max(decimals, 0)}f}"


def scientific(number: float, decimals: int = 2) -> str:
    """Format `1.23e-7`, `4.50e12`."""
    mantissa, exponent = f"{number:.{decimals}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def duration(seconds: float) -> str:
    """Format `0:01:05`, `23:59:59`, `2d 03:04`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}:{minutes:02}:{seconds:02}"
    return f"{hours // 24}d {hours % 24:02}:{minutes:02}"


def few(names: Iterable[object], limit: int = 3) -> str:
    """Format `a, b, c and 7 more`."""
    names = list(names)
    more = len(names) - limit
    return ", ".join(map(str, names[:limit])) + (f" and {more} more" if more > 0 else "")


def ranges(numbers: Iterable[int]) -> str:
    """Format `0-3, 8`, with at most three ranges."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    shown = [f"{first}" if first == last else f"{first}-{last}" for first, last in found[:3]]
    return ", ".join(shown) + (", ..." if len(found) > 3 else "")


def natural_order(name: str) -> list[tuple[int, str]]:
    """Return a sort key that orders numbers in a name: `layers.2` before `layers.10`."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def is_url(location: str) -> bool:
    return "://" in location


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8, unlike command-line bytes that are none."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str) -> str:
    """Escape control characters, which a terminal would obey, and what it cannot show."""
    return _UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], text)


def first_line(error: BaseException) -> str:
    """Return an error's type and its message's first line (PyTorch's messages add C++ frames)."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
