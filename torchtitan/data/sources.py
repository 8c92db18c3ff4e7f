"""Named datasets: the registry, and the sources that need nothing but files.

A source is one of two kinds.

* Random access: `len(source)` documents, `source[i]` is the text of one. They are shuffled anew in
  every epoch. A plain list of texts is such a source.
* Sequential: iterating over it yields the texts from the first one on, each time anew. The order
  is kept. It may consist of shards (files) that can be read one by one: then ranks share the
  reading out among them, and a resumed run reads on from its shard, not from the beginning.
"""

from __future__ import annotations

import bisect
import glob
import itertools
import math
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol, runtime_checkable

from torchtitan.data import huggingface
from torchtitan.errors import ConfigError, DataError, did_you_mean


class RandomAccess(Protocol):
    """A source whose texts can be had in any order."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> str: ...


Sequential = Iterable[str]


@runtime_checkable
class Sharded(Protocol):
    """A sequential source with shards."""

    num_shards: int

    def __iter__(self) -> Iterator[str]: ...
    def shard(self, index: int) -> Iterable[str]:
        """The texts of one of the `num_shards` shards."""


Source = RandomAccess | Sequential
SourceFactory = Callable[[str | None, str], Source]
"""`factory(dataset_path, text_key) -> Source`; raises a `TitanError` for a user's mistake."""

DATASETS: dict[str, SourceFactory] = {}
"""Name of a dataset (`training.dataset`) -> its factory."""


def register_dataset(name: str, factory: SourceFactory) -> None:
    """Make a dataset known as `training.dataset = name`. Repeating the same call is harmless.

    Raises:
        ValueError: the name is taken by another factory.
    """
    if DATASETS.setdefault(name, factory) is not factory:
        raise ValueError(f"dataset {name!r} is already registered; choose another name")


def open_dataset(name: str, path: str | None, text_key: str = "text") -> Source:
    """Open a dataset by name.

    Args:
        name: a key of `DATASETS`.
        path: `dataset_path` of the config section.
        text_key: field that holds the text, in formats that have fields.

    Raises:
        ConfigError: there is no such dataset, or `path` is missing or of no use.
        DataError: the data is missing, empty or malformed.
    """
    if name not in DATASETS:
        raise ConfigError(f"no such dataset.{did_you_mean(name, DATASETS)}")
    return DATASETS[name](path, text_key)


class TextFiles:
    """UTF-8 text files; each is a document.

    A file of more than `piece_bytes` is cut at line ends into pieces of about that size, each a
    document, so that a whole corpus in one file is shuffled too and need not fit into memory.

    Raises:
        DataError: a file cannot be read or, where its text is asked for, is not UTF-8.
    """

    def __init__(self, files: list[str], piece_bytes: int = 2**20) -> None:
        self._files = files
        self._piece_bytes = piece_bytes
        pieces = (max(1, math.ceil(_file_size(file) / piece_bytes)) for file in files)
        self._ends = list(itertools.accumulate(pieces))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> str:
        number = bisect.bisect_right(self._ends, index)
        piece = index - (self._ends[number - 1] if number else 0)
        path = self._files[number]
        try:
            with open(path, "rb") as file:
                start = self._cut(file, piece)
                end = self._cut(file, piece + 1)
                file.seek(start)
                content = file.read(end - start)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            line = _line_number(path, start + error.start)
            raise DataError(f"{path}:{line}: not UTF-8 text ({error.reason})") from error

    def _cut(self, file: BinaryIO, piece: int) -> int:
        """Where a piece begins: after the first line end in its share of the file's bytes."""
        if piece == 0:
            return 0
        start = piece * self._piece_bytes
        file.seek(start)
        share = file.read(self._piece_bytes)
        line_end = share.find(b"\n")
        if line_end >= 0:
            return start + line_end + 1
        # One very long line is cut anywhere, but not within a character (10xxxxxx goes on one).
        inside = itertools.takewhile(lambda byte: byte & 0xC0 == 0x80, share[:3])
        return start + len(list(inside))


def _file_size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _line_number(path: str, offset: int) -> int:
    """Number, from 1, of the line that byte `offset` of a file is in."""
    line, block = 1, 2**20
    with open(path, "rb") as file:
        for start in range(0, offset, block):
            line += file.read(min(block, offset - start)).count(b"\n")
    return line


def find_files(path: str | None, suffixes: tuple[str, ...] = ("",)) -> list[str]:
    """Sorted files of a path, a glob (`**` crosses folders) or a folder with all its subfolders.

    In a folder, hidden files and those that end in none of `suffixes` are left out.

    Raises:
        ConfigError: no path is given.
        DataError: there is no such file.
    """
    if not path:
        raise ConfigError("needs dataset_path: a file, a glob or a folder")
    root = os.path.expanduser(path)
    if os.path.isdir(root):
        found = glob.glob(os.path.join(glob.escape(root), "**"), recursive=True)
        found = [file for file in found if file.endswith(suffixes)]
    elif os.path.exists(root):
        found = [root]
    else:
        found = glob.glob(root, recursive=True)
    files = sorted(file for file in found if os.path.isfile(file))
    if not files:
        of_kind = f" that ends in {' or '.join(suffixes)}" if any(suffixes) else ""
        raise DataError(f"dataset_path = {path!r}: there is no such file{of_kind}")
    return files


def stdlib_files(held_out: bool) -> list[str]:
    """Sources of the interpreter's standard library, sorted: about 5% are held out, by a hash.

    Raises:
        DataError: the interpreter comes without them.
    """
    root = sysconfig.get_paths()["stdlib"]
    not_text = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = set(subfolders) - not_text  # the others are not entered
        names += [
            Path(folder, file).relative_to(root).as_posix()
            for file in files
            if file.endswith(".py") and not file.startswith("_sysconfigdata")  # of this build
        ]
    chosen = sorted(name for name in names if (zlib.crc32(name.encode()) % 20 == 0) == held_out)
    if not chosen:
        raise DataError(f"this Python has no library sources in {root}; use `text` with own files")
    return [os.path.join(root, name) for name in chosen]


def _open_stdlib(path: str | None, held_out: bool) -> TextFiles:
    if path is not None:
        raise ConfigError("dataset_path has no effect here; remove it, or use `text` for own files")
    return TextFiles(stdlib_files(held_out))


def _open_text(path: str | None, text_key: str) -> TextFiles:
    return TextFiles(find_files(path))


def _open_jsonl(path: str | None, text_key: str) -> RandomAccess:
    plain = (".jsonl", ".json")
    packed = tuple(suffix + ending for suffix in plain for ending in (".gz", ".zst"))
    return huggingface.open_files("json", find_files(path, plain + packed), text_key)


def _open_parquet(path: str | None, text_key: str) -> RandomAccess:
    return huggingface.open_files("parquet", find_files(path, (".parquet",)), text_key)


def _on_hub(repository: str, config: str | None = None, split: str = "train") -> SourceFactory:
    return lambda path, text_key: huggingface.open_stream(repository, config, split, path, text_key)


register_dataset("stdlib", lambda path, text_key: _open_stdlib(path, held_out=False))
register_dataset("stdlib_validation", lambda path, text_key: _open_stdlib(path, held_out=True))
register_dataset("text", _open_text)
register_dataset("jsonl", _open_jsonl)
register_dataset("parquet", _open_parquet)
register_dataset("c4", _on_hub("allenai/c4", "en"))
register_dataset("c4_validation", _on_hub("allenai/c4", "en", split="validation"))
register_dataset("fineweb", _on_hub("HuggingFaceFW/fineweb"))
register_dataset("fineweb_edu", _on_hub("HuggingFaceFW/fineweb-edu"))
register_dataset("slimpajama", _on_hub("cerebras/SlimPajama-627B"))
