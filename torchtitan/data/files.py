"""Finds the files of a dataset by path, glob, folder or URL, and reads parts of them.

Any URL works that `fsspec` opens: `s3://`, `gs://`, `https://`, `memory://`, ...
"""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from torchtitan.errors import ConfigError, DataError, TitanError, outage_or
from torchtitan.tools.text import is_url


def find_files(path: str | None, suffixes: tuple[str, ...] = ("",)) -> list[str]:
    """Find the files of a path, a glob (`**` crosses folders), a folder with all its subfolders, or
    the same behind a URL. Returns them sorted.

    In a folder, hidden files and those that end in none of `suffixes` are left out; a glob finds
    hidden files only if it names them. A local file that links lead to twice, as in a folder with a
    link to itself, is returned once, by its shortest path.

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
    with reading(root), suppress(FileNotFoundError, NotADirectoryError):
        os.stat(root)  # raises what `isdir` and `exists` take for a missing file
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
            seen = [file for file in system.glob(path) if "/." in path or "/." not in file]
            found = [file for file in seen if system.isfile(file)]
        elif system.isdir(path):
            folder = path.rstrip("/")
            seen = [file for file in system.find(path) if "/." not in file.removeprefix(folder)]
            found = [file for file in seen if file.endswith(suffixes)]
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
    with reading(path, Exception), fsspec.open(path, "rb", compression="infer") as file:
        yield file


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
    return outage_or(DataError, problem, error)


@contextmanager
def reading(path: str | Path, foreign: type[Exception] = OSError) -> Iterator[None]:
    """Wrap code that reads a file or URL. Raises as `unreadable` says.

    Args:
        foreign: errors of the reader. The file systems behind URLs, and damaged compression, have
            their own types.
    """
    foreign = Exception if is_url(str(path)) else foreign
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


def sha256(path: Path) -> str:
    """Return the hexadecimal digest of a local file. Raises as `unreadable` says."""
    with reading(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
