"""Finds the files of a dataset by path, glob, folder or URL, and reads parts of them.

Any URL works that `fsspec` opens: `s3://`, `gs://`, `https://`, `memory://`, ...
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from torchtitan.errors import ConfigError, DataError, TitanError, disk_is_full, outage_or
from torchtitan.tools.text import is_url

_BLOCK = 2**24
_KEPT_FROM_BYTES = 2**20
_BETWEEN_LOOKS = 0.2
_LONGEST_PAUSE = 5.0
_LONGEST_WAIT = 1800.0
"""Seconds. A process that ends earlier releases its lock."""


def find_files(path: str | None, suffixes: tuple[str, ...] = ("",)) -> list[str]:
    """Find the files of a path, a glob (`**` crosses folders), a folder with all its subfolders, or
    the same behind a URL. Returns them sorted.

    In a folder, hidden files and those that end in none of `suffixes` are left out. A local file
    that links lead to twice, as in a folder with a link to itself, is returned once, by its
    shortest path.

    Raises:
        ConfigError: no path is given, or the URL's protocol is unknown or not installed.
        DataError: there is no such file.
        OutageError: the storage does not answer.
    """
    if not path:
        raise ConfigError("needs dataset_path: a file, a glob or a folder")
    files = _find_remote(path, suffixes) if is_url(path) else _find_local(path, suffixes)
    if not files:
        of_kind = f" that ends in {' or '.join(suffixes)}" if any(suffixes) else ""
        raise DataError(f"dataset_path = {path!r}: there is no such file{of_kind}")
    return files


def _find_local(path: str, suffixes: tuple[str, ...]) -> list[str]:
    root = os.path.expanduser(path)
    if os.path.isdir(root):
        found = {file: real for file, real in _files_below(root) if file.endswith(suffixes)}
    else:
        paths = [root] if os.path.exists(root) else glob.glob(root, recursive=True)
        found = {file: os.path.realpath(file) for file in paths if os.path.isfile(file)}
    longest_first = sorted(found, key=lambda file: (len(file), file), reverse=True)
    return sorted({found[file]: file for file in longest_first}.values())


def _files_below(folder: str, around: frozenset[str] = frozenset()) -> Iterator[tuple[str, str]]:
    """Yield the path of each file in a folder, and its path without links; no hidden ones.

    Like `glob`, but that tries to open each file as a folder, and thousands of ranks search the
    same folders at the same time.
    """
    real = os.path.realpath(folder)
    if real in around:  # by a link: all files have shorter paths
        return
    with reading(folder), suppress(PermissionError), os.scandir(folder) as entries:
        for entry in entries:
            path, link = entry.path, entry.is_symlink()
            if entry.name.startswith("."):
                continue
            if os.path.isdir(path) if link else entry.is_dir():
                yield from _files_below(path, around | {real})
            elif os.path.isfile(path) if link else entry.is_file():
                yield path, os.path.realpath(path) if link else os.path.join(real, entry.name)


def _find_remote(url: str, suffixes: tuple[str, ...]) -> list[str]:
    import fsspec

    try:
        system, path = fsspec.url_to_fs(url)
        if glob.has_magic(path):
            found = [file for file in system.glob(path) if system.isfile(file)]
        elif system.isdir(path):
            found = [file for file in system.find(path) if file.endswith(suffixes)]
        else:
            found = [path] if system.exists(path) else []
        return sorted(system.unstrip_protocol(file) for file in found)
    except (ImportError, ValueError) as error:  # the protocol is unknown
        raise ConfigError(f"dataset_path = {url!r}: {error}") from error
    except Exception as error:  # each file system has its own exception types
        raise unreadable(url, error) from error


def open_file(path: str) -> BinaryIO:
    """Open a file or URL for reading bytes with random access. Raises as `unreadable` says."""
    with reading(path):
        if not is_url(path):
            return open(path, "rb")
        import fsspec

        return fsspec.open(path, "rb").open()


@contextmanager
def unpacked(path: str) -> Iterator[BinaryIO]:
    """Open a file or URL, decompressed if necessary. Raises as `unreadable` says."""
    import fsspec

    if path.endswith(".zst") and "zstd" not in fsspec.available_compressions():
        raise ConfigError(f"{path}: .zst files need the package zstandard: pip install zstandard")
    try:
        with fsspec.open(path, "rb", compression="infer") as file:
            yield file
    except TitanError:
        raise
    except Exception as error:  # from `fsspec`, or from damaged compression
        raise unreadable(path, error) from error


def unreadable(path: str | Path, error: Exception) -> TitanError:
    """Return the error to raise for a read error: `DataError`, or `OutageError` if it may pass."""
    reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    problem = f"{path} cannot be read: {reason}"
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENOMEM):
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return DataError(
            f"{problem}. This process may have {soft:,} files open (`ulimit -Hn`), and as many "
            "mappings as the system's vm.max_map_count. Raise these limits, or use fewer files: "
            "for tokens, prepare them again with a smaller --shards"
        )
    return DataError(problem) if disk_is_full(error) else outage_or(DataError, problem, error)


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Wrap code that reads a file or URL. Raises as `unreadable` says."""
    # The file systems behind URLs, and damaged compression, have their own exception types.
    foreign = Exception if is_url(str(path)) else OSError
    try:
        yield
    except TitanError:
        raise
    except foreign as error:
        raise unreadable(path, error) from error


def file_size(path: str) -> int:
    """Return the size in bytes. Raises as `unreadable` says."""
    with reading(path):
        if not is_url(path):
            return os.path.getsize(path)
        import fsspec

        system, inner = fsspec.url_to_fs(path)
        return system.size(inner)


def line_number(path: str, offset: int) -> int:
    """Return the number, from 1, of the line that contains byte `offset` of a file."""
    line, block = 1, 2**20
    with reading(path), open_file(path) as file:
        for start in range(0, offset, block):
            line += file.read(min(block, offset - start)).count(b"\n")
    return line


def sha256(path: str | Path) -> str:
    """Return the hexadecimal digest of a file's content. Raises as `unreadable` says."""
    with reading(path), open_file(str(path)) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    cached = cache_folder() / "ends" / f"{name}.npy"
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
    try:
        return np.load(path, mmap_mode="r").view(np.ndarray)
    except (OSError, ValueError):
        return None


def cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "torchtitan"


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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            np.save(file, array)
        os.replace(file.name, path)
    except OSError:
        pass  # a cache that cannot be written only costs time
