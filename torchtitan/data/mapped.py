"""Memory-maps files of numbers as arrays for random access."""

from __future__ import annotations

import mmap
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan.errors import DataError

from .files import reading

_MOST_AHEAD = 2**24
"""Bytes of a document that are requested at once; a document may be as long as the file."""
_AHEAD_AT_ONCE = 2**17
"""By one call, Linux requests no more from a disk than the disk's usual read-ahead, and drops the
rest. This is its default."""
_MOST_SHARDS = 8192
"""Two mappings each: a quarter of a process's 65,530 mappings (vm.max_map_count), of which CUDA
needs some too."""


def map_file(path: str | Path, dtype: np.dtype | str, start: int = 0) -> np.ndarray:
    """Memory-map a file's items from byte `start` on: `[items]`.

    Raises:
        DataError: the file is no whole number of items, or as `unreadable` says.
    """
    dtype = np.dtype(dtype)
    with reading(path), open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size == start:
            return np.empty(0, dtype)
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # Otherwise the system reads 128 KiB or much more around each page that is touched, although
        # documents are read at random.
        memory.madvise(mmap.MADV_RANDOM)
    if (size - start) % dtype.itemsize:
        raise DataError(f"{path} is damaged: its size is not a whole number of {dtype.name} ids")
    return np.frombuffer(memory, dtype, offset=start)


def read_ahead(items: np.ndarray, first: int, last: int) -> np.ndarray:
    """Return `items[first:last]` of a `map_file` array, requesting it from the disk as a whole."""
    part = items[first:last]
    memory = getattr(items.base, "obj", items.base)  # NumPy refers to a mapping by a memoryview
    if not isinstance(memory, mmap.mmap):
        return part
    begin = len(memory) - items.nbytes + first * items.itemsize
    end = begin + min(part.nbytes, _MOST_AHEAD)
    begin -= begin % mmap.PAGESIZE
    if end - begin > mmap.PAGESIZE:
        for at in range(begin, end, _AHEAD_AT_ONCE):
            memory.madvise(mmap.MADV_WILLNEED, at, min(_AHEAD_AT_ONCE, end - at))
    return part


class Pool:
    """Keeps the most recently used of some lazily opened things open.

    A mapping keeps its file open, and a process can have only so many open files.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[object, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def get(self, key: object, open_it: Callable[[], Any]) -> Any:
        """Return the result of `open_it`, from now or before. Thread-safe."""
        with self._lock:
            if key in self._open:
                self._open.move_to_end(key)
                return self._open[key]
        value = open_it()  # may take long; the other threads need not wait
        with self._lock:
            self._open[key] = value
            while len(self._open) > most_shards():
                self._open.popitem(last=False)  # unmapped once no document of it is in use
        return value


def most_shards() -> int:
    """Count the files, with an index each, that use half of this process's limit of open files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_SHARDS if soft == resource.RLIM_INFINITY else max(1, min(soft // 4, _MOST_SHARDS))


SHARDS = Pool()
"""Shared by all sources, since the limit applies to the process."""
