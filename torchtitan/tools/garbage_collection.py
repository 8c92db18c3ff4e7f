"""Collects garbage at fixed steps, so that all ranks pause together, not one after another."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


class GarbageCollection:
    """Switches Python's automatic collection off and collects every `freq` steps instead.

    A rank that stops on its own to collect makes all others wait at the next collective.
    `freq = 0` leaves Python's own collection as it is.
    """

    def __init__(self, freq: int) -> None:
        self._freq = freq
        self._was_enabled = gc.isenabled()
        if freq:
            gc.collect()
            gc.disable()

    def step(self, step: int) -> None:
        """Collect young objects (generation 1) when `step` is a multiple of `freq`.

        A full collection would also walk every module and cached graph, for seconds.
        """
        if self._freq and step % self._freq == 0:
            gc.collect(generation=1)

    def close(self) -> None:
        """Switch Python's own collection on again."""
        if self._freq and self._was_enabled:
            gc.enable()


@contextmanager
def without_collection() -> Iterator[None]:
    """For what makes millions of objects that stay: each collection would look at them in vain."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
