"""Finds where the pieces of a file end, such as its lines: once, for all that ask."""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from torchtitan.tools.result_file import own_partial

from .files import open_file, reading

_BLOCK = 2**24
_KEPT_FROM_BYTES = 2**20
_BETWEEN_LOOKS = 0.2
_LONGEST_PAUSE = 5.0
_LONGEST_WAIT = 1800.0
"""Seconds. A process that ends earlier releases its lock."""


def ends_of(path: str, value: int, dtype: str = "uint8", start: int = 0) -> np.ndarray:
    """Find the ends of a local file's pieces, each terminated by `value`, such as a line end.

    The file is read once. For a large file the result is kept in the user's cache folder and
    memory-mapped, so that it costs neither time nor memory later.

    Args:
        dtype: of the file's items.
        start: byte at which the items begin.

    Returns:
        `[pieces]` int64: the item after the end of each piece, in order, counted from `start`.
        The last is the number of items, whether or not the file ends with `value`.

    Raises:
        DataError: the file cannot be read.
        OutageError: it cannot be read now.
    """
    with reading(path):
        status = os.stat(path)
    if status.st_size < _KEPT_FROM_BYTES:
        return _find_ends(path, value, np.dtype(dtype), start)
    key = [os.path.abspath(path), status.st_size, status.st_mtime_ns, value, dtype, start]
    name = hashlib.sha256(repr(key).encode()).hexdigest()[:32]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    cached = Path(cache, "torchtitan", "ends", f"{name}.npy")
    found = _load(cached)
    if found is not None:
        return found
    with _after_others(cached):
        found = _load(cached)
        if found is None:
            found = _find_ends(path, value, np.dtype(dtype), start)
            _keep(cached, found)
            kept = _load(cached)
            found = found if kept is None else kept
    return found


@contextmanager
def _after_others(cached: Path) -> Iterator[None]:
    """Let one of the processes that want the same result begin at once, the others when it ends.

    If the cache cannot be written, or has no locks, all begin at once.
    """
    lock = cached.with_suffix(".lock")
    waited = 0.0
    with ExitStack() as stack:
        with suppress(OSError):
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(lock.open("wb"))
            while not try_lock(file) and waited < _LONGEST_WAIT:
                # By how long it has taken, since thousands of ranks may ask one file server.
                pause = min(max(_BETWEEN_LOOKS, waited / 4), _LONGEST_PAUSE)
                time.sleep(pause)
                waited += pause
        if waited:
            stack.close()  # if the first process kept nothing, the others need not take turns
        yield
        if not waited:
            with suppress(OSError):
                lock.unlink()


def try_lock(file: BinaryIO) -> bool:
    """Try to lock the file; return whether it worked. Raises `OSError` if there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _load(path: Path) -> np.ndarray | None:
    """Memory-map a file of `np.save`; None without one. `np.load` would open it three times."""
    try:
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)
            (length,), _, dtype = np.lib.format.read_array_header_1_0(file)
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return np.frombuffer(memory, dtype, length, file.tell())
    except (OSError, ValueError):
        return None


def _find_ends(path: str, value: int, dtype: np.dtype, start: int) -> np.ndarray:
    found, items = [], 0
    with reading(path), open_file(path) as file:
        file.seek(start)
        while block := file.read(_BLOCK):
            part = np.frombuffer(block[: len(block) // dtype.itemsize * dtype.itemsize], dtype)
            found.append(np.flatnonzero(part == value) + (items + 1))
            items += len(part)
    ends = np.concatenate(found).astype(np.int64) if found else np.empty(0, np.int64)
    if items and (not len(ends) or ends[-1] != items):
        ends = np.append(ends, items)
    return ends


def _keep(path: Path, array: np.ndarray) -> None:
    """Write to the cache atomically: several ranks may do so at once."""
    partial = own_partial(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.save(file, array)
        partial.replace(path)
    except OSError:  # a cache that cannot be written only costs time
        with suppress(OSError):
            partial.unlink()
