"""Access checkpoints in a local folder or in a storage that fsspec supports (`s3://bucket/run`).

`RemotePath` has the few methods of `pathlib.Path` that are needed here, so that the code for
checkpoints works the same for local and remote folders.
"""

from __future__ import annotations

import errno
import itertools
import os
import zlib
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeVar, cast

from torch.distributed.checkpoint.filesystem import FileSystem

from torchtitan.errors import ConfigError, may_pass
from torchtitan.tools.text import first_line, is_url

from .retry import read_again

_CHUNK = 1 << 20
"""Bytes per step of checksumming and writing or reading, small enough for the CPU's cache."""
AT_ONCE = 16
"""Number of files looked at, read or deleted in parallel: a file server takes about 1 ms for each,
and each rank has one."""


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """Raise outages as `OSError`, which callers catch; those of botocore, for example, are not."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if may_pass(error):
            raise OSError(errno.EIO, first_line(error)) from error
        raise


class RemotePath:
    """A file or folder in a storage that fsspec supports, given by its URL.

    Its methods raise `OSError` for an outage, whatever the storage's package raises.

    Raises:
        ConfigError: URLs of this kind are not supported, or need a package that is missing.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self._url = url.rstrip("/")
        scheme = url.partition("://")[0]
        try:
            # Cached listings would not show files that other ranks have written.
            self.fs, self._path = fsspec.url_to_fs(self._url, use_listings_cache=False)
        except ImportError as error:
            raise ConfigError(f"{url}: a package for {scheme}:// is missing: {error}") from error
        except ValueError as error:
            raise ConfigError(f"{url}: fsspec does not support {scheme}:// ({error})") from error

    def __str__(self) -> str:
        return self._url

    def __fspath__(self) -> str:
        return self._url

    def __reduce__(self) -> tuple[Any, ...]:
        return RemotePath, (self._url,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and other._url == self._url

    def __hash__(self) -> int:
        return hash(self._url)

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self._url}/{name}")

    @property
    def name(self) -> str:
        return self._url.rpartition("/")[2]

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self._url.rpartition("/")[0])

    def with_name(self, name: str) -> RemotePath:
        return self.parent / name

    @contextmanager
    def open(self, mode: str = "rb", buffering: int = -1) -> Iterator[BinaryIO]:
        with _as_os_errors(), self.fs.open(self._path, mode) as file:
            yield file

    @_as_os_errors()
    def read_bytes(self) -> bytes:
        return self.fs.cat_file(self._path)

    def exists(self) -> bool:
        """Raises `OutageError` in an outage, for which fsspec's `exists` would return False."""
        try:
            read_again(self, self._look)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    @_as_os_errors()
    def _look(self) -> None:
        self.fs.info(self._path)

    @_as_os_errors()
    def entries(self) -> dict[str, int | None]:
        """Map names to sizes of files in bytes, None for folders. Raises `FileNotFoundError`."""
        sizes = {}
        for entry in self.fs.ls(self._path, detail=True):
            name = entry["name"].rstrip("/").rpartition("/")[2]
            sizes[name] = entry["size"] if entry["type"] == "file" else None
        return sizes

    @_as_os_errors()
    def mkdir(self) -> None:
        """Create the folder, in storage where folders are more than parts of names."""
        self.fs.makedirs(self._path, exist_ok=True)

    @_as_os_errors()
    def remove(self) -> None:
        """Delete a folder and its contents, if it exists."""
        if self.exists():
            self.fs.rm(self._path, recursive=True)

    @_as_os_errors()
    def write_bytes(self, content: bytes) -> None:
        """Write a file; atomic in an object store."""
        self.fs.pipe_file(self._path, content)

    @_as_os_errors()
    def unlink(self) -> None:
        self.fs.rm_file(self._path)

    @_as_os_errors()
    def unlink_files(self, names: Collection[str]) -> None:
        """Delete files of this folder, up to a thousand per request if the storage supports it."""
        if names:
            self.fs.rm([f"{self._path}/{name}" for name in names])

    @_as_os_errors()
    def copy_files(self, names: Collection[str], target: RemotePath) -> None:
        """Copy files of this folder to another, within the storage if it can."""
        if names:
            sources, copies = ([f"{of._path}/{n}" for n in names] for of in (self, target))
            self.fs.copy(sources, copies)


StoragePath = Path | RemotePath
P = TypeVar("P", bound=StoragePath)


def storage_path(location: str | os.PathLike[str]) -> StoragePath:
    """Return a local path (also for `file://`) or a `RemotePath`. Raises `ConfigError`."""
    text = os.fspath(location)
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    if not is_url(text):
        return Path(text).expanduser()
    if any(character in text for character in "*?["):
        # fsspec would take this for a pattern, and delete files of other folders too.
        raise ConfigError(f"{text}: the URL of a folder must not contain *, ? or [")
    return RemotePath(text)


def local_path(location: str) -> Path:
    """Return the path of a local folder (also for `file://`). Raises `ConfigError` for a URL."""
    if is_url(location) and not location.startswith("file://"):
        raise ConfigError(
            f"{location}: URLs are not supported here. Use a local folder, and copy it"
        )
    return cast(Path, storage_path(location))


def is_there(path: StoragePath) -> bool:
    """Return whether a name is in use, be it by a link whose target is gone."""
    if isinstance(path, RemotePath):
        return path.exists()
    with suppress(FileNotFoundError, NotADirectoryError):
        path.lstat()  # raises what `os.path.lexists` takes for a missing file
        return True
    return False


def sizes_in(folder: StoragePath) -> dict[str, int]:
    """Map each file in a folder to its size in bytes; empty if there is no such folder.

    Raises:
        OutageError: the folder cannot be listed.
    """
    return {name: size for name, size in _entries(folder).items() if size is not None}


def folders_in(folder: P) -> list[P]:
    """Return the subfolders of a folder; none if there is no such folder.

    A link whose target is gone is one: it may lead to storage that is not mounted.
    """
    return [cast(P, folder / name) for name, size in _entries(folder).items() if size is None]


def _entries(folder: StoragePath) -> dict[str, int | None]:
    def entries() -> dict[str, int | None]:
        if isinstance(folder, RemotePath):
            return folder.entries()
        with os.scandir(folder) as found, ThreadPoolExecutor(AT_ONCE) as threads:
            listed = list(found)
            parts = (listed[first::AT_ONCE] for first in range(min(AT_ONCE, len(listed))))
            return dict(itertools.chain.from_iterable(threads.map(_sizes_of, parts)))

    try:
        return read_again(folder, entries)
    except (FileNotFoundError, NotADirectoryError):
        return {}


def _sizes_of(entries: list[os.DirEntry[str]]) -> list[tuple[str, int | None]]:
    return [(entry.name, _size_of(entry)) for entry in entries]


def _size_of(entry: os.DirEntry[str]) -> int | None:
    try:
        return None if entry.is_dir() else entry.stat().st_size
    except FileNotFoundError:  # the target of a link is gone
        return None


def write_durably(path: StoragePath, content: bytes) -> FileRecord:
    """Write a file; return its record once it is on disk."""
    if isinstance(path, RemotePath):
        path.write_bytes(content)
    else:
        with path.open("wb") as file:
            file.write(content)
            flush_to_disk(file)
    return FileRecord(len(content), f"{zlib.crc32(content):08x}")


def flush_to_disk(file: IO[Any]) -> None:
    """Flush a file to disk; a remote file has no descriptor and is stored when it is closed."""
    file.flush()
    try:
        descriptor = file.fileno()
    except (AttributeError, OSError):
        return
    os.fsync(descriptor)


def sync_file(path: Path) -> None:
    """Wait until the contents of a local file are on disk, whichever process wrote it."""
    with path.open("rb") as file:
        flush_to_disk(file)


_NO_SYNC_OF_FOLDERS = (errno.EINVAL, errno.EBADF, errno.ENOTSUP)
"""What file systems answer that sync files alone, as some network and shared folders do."""


def sync_folder(folder: Path) -> None:
    """Wait until the names in a local folder are on disk, if its file system can tell."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC_OF_FOLDERS:
            raise
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create a local folder and its parents, so that they survive a power failure."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


@dataclass(frozen=True)
class FileRecord:
    """A manifest's record of a file."""

    size: int
    """Size in bytes."""
    crc32: str
    """CRC-32 of the bytes, 8 hexadecimal digits. It detects any single flipped bit."""

    def __str__(self) -> str:
        return f"CRC-32 {self.crc32} ({self.size} bytes)"

    @classmethod
    def of(cls, path: StoragePath) -> FileRecord:
        """Read a file and return its record."""
        size, crc = 0, 0
        buffer = memoryview(bytearray(_CHUNK))
        file: Any
        with path.open("rb", buffering=0) as file:
            while got := file.readinto(buffer):
                crc = zlib.crc32(buffer[:got], crc)
                size += got
        return cls(size, f"{crc:08x}")


class _RecordedStream:
    """A file that is written sequentially, with a running record of its contents."""

    def __init__(self, file: IO[Any]) -> None:
        self._file = file
        self._size = self._crc = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _CHUNK):
            chunk = view[start : start + _CHUNK]
            self._crc = zlib.crc32(chunk, self._crc)
            self._file.write(chunk)
        self._size += len(view)
        return len(view)

    @property
    def record(self) -> FileRecord:
        return FileRecord(self._size, f"{self._crc:08x}")

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """Do nothing: `create_stream` closes the file once it is on disk."""


class CheckpointFiles(FileSystem):
    """Opens local and remote files for torch.distributed.checkpoint.

    `records` maps the name of each written file to its `FileRecord`. Paths are `StoragePath`s, but
    typed as `Any`, since PyTorch's signatures only allow local paths.
    """

    def __init__(self) -> None:
        self.records: dict[str, FileRecord] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with path.open(mode) as file:
            if mode == "rb":
                yield file
                return
            stream = _RecordedStream(file)
            yield stream
            flush_to_disk(file)
        self.records[path.name] = stream.record

    def init_path(self, path: Any) -> Any:
        return path

    def concat_path(self, path: Any, suffix: str) -> Any:
        return path / suffix
