"""Runs an iterator ahead of its consumer, in a background thread."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

PREFETCHED_BATCHES = 4
"""Micro-batches that data loaders keep ready."""


class Prefetcher(Generic[T]):
    """An iterator over `items` that keeps up to `depth` of them ready.

    An exception of `items` is raised to the consumer unchanged, in its turn. The thread ends on
    `close()`, when the prefetcher is garbage-collected, or at the interpreter's exit.
    """

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._ready: queue.Queue[T | _End] = queue.Queue(depth)
        stop = threading.Event()
        thread = threading.Thread(
            target=_produce,
            args=(items, self._ready, stop),
            name="torchtitan-prefetch",
            daemon=True,  # a thread that hangs in a network read must not keep the process alive
        )
        self.close = weakref.finalize(self, _shut_down, self._ready, stop, thread)
        """Stop the thread. Calling it again does nothing."""
        thread.start()

    def __iter__(self) -> Prefetcher[T]:
        return self

    def __next__(self) -> T:
        item = self._ready.get()
        if isinstance(item, _End):
            self._ready.put(item)  # for the next call: the thread has ended
            raise item.reason
        return item


class _End:
    def __init__(self, reason: BaseException) -> None:
        self.reason = reason


def _produce(items: Iterator[T], ready: queue.Queue[T | _End], stop: threading.Event) -> None:
    try:
        for item in items:
            ready.put(item)
            if stop.is_set():
                return
        ready.put(_End(StopIteration()))
    except BaseException as error:
        ready.put(_End(error))


def _shut_down(ready: queue.Queue, stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    try:
        while True:
            ready.get_nowait()  # makes room, in case the thread is blocked in put
    except queue.Empty:
        pass
    thread.join(timeout=5)
