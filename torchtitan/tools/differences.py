"""Compares nested dicts, such as two configurations or the hyperparameters of two models."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any


def nested_differences(
    saved: dict[str, Any],
    current: dict[str, Any],
    ignored: Collection[str] = (),
    prefix: str = "",
    *,
    may_lack_options: bool = False,
) -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted name of each value that differs, and both values; None: absent.

    Args:
        ignored: last parts of names to pass over.
        may_lack_options: a value that `saved` lacks is no difference if it is off (0, false,
            empty), as the code may have had no such option then.
    """
    for name in dict.fromkeys([*saved, *current]):
        a, b = saved.get(name), current.get(name)
        added = may_lack_options and name not in saved and not b
        if isinstance(a, dict) and isinstance(b, dict):
            path = f"{prefix}{name}."
            yield from nested_differences(a, b, ignored, path, may_lack_options=may_lack_options)
        elif a != b and name not in ignored and not added:
            yield f"{prefix}{name}", a, b


def told(differences: Iterable[tuple[str, Any, Any]]) -> list[str]:
    """Return each difference as `dim = 16 (now 32)`."""
    return [f"{name} = {a} (now {b})" for name, a, b in differences]
