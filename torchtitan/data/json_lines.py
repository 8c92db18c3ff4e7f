"""Reads JSON Lines, one object a line, by random access or as a stream."""

from __future__ import annotations

import bisect
import itertools
import mmap
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from torchtitan.errors import BadDocumentError, DataError, begin_errors_with
from torchtitan.tools.foreign_files import parse_json

from .files import reading, unpacked
from .mapped import SHARDS
from .piece_ends import ends_of
from .rows import check_key, read_line

if TYPE_CHECKING:
    import numpy as np


_LINE_END = ord("\n")


class JsonLines:
    """Random access to the lines of local, uncompressed files; each is a document.

    A blank line is an empty document. Of thousands of files, only the most recently used ones stay
    open: see `mapped.SHARDS`.

    Raises:
        DataError: a file cannot be read, all are empty, or the first object lacks `text_key`.
            Taking a document raises `BadDocumentError` if its line is not such an object.
    """

    def __init__(self, files: list[str], text_key: str) -> None:
        self.files = files
        self._text_key = text_key
        # Not yet opened: thousands of ranks may do this for thousands of files at the same time.
        self._counts = [len(ends_of(file, _LINE_END)) for file in files]
        self._starts = list(itertools.accumulate(self._counts, initial=0))
        lines = (
            (f"{file}:{line + 1}", self._line(number, line))
            for number, file in enumerate(files)
            for line in range(self._counts[number])
        )
        check_first(lines, text_key, files)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> object:
        number = bisect.bisect_right(self._starts, index) - 1
        line = index - self._starts[number]
        return read_line(self._line(number, line), self._text_key, self.files[number], line + 1)

    def _line(self, number: int, line: int) -> bytes:
        content, ends = SHARDS.get((self, number), partial(self._open, number))
        return content[int(ends[line - 1]) if line else 0 : int(ends[line])]

    def _open(self, number: int) -> tuple[mmap.mmap | bytes, np.ndarray]:
        """Return the content of a file, and the ends of its lines."""
        file = self.files[number]
        content, ends = _map(file), ends_of(file, _LINE_END)
        if self._counts[number] != len(ends):
            raise DataError(f"{file} has changed while it was read: it has other lines now")
        return content, ends


class JsonLineStream:
    """The lines of files that cannot be mapped (URLs, perhaps compressed); files are the shards.

    A line that is not an object with `text_key` is yielded as a `BadDocumentError`, for the reader
    to raise or to skip.
    """

    def __init__(self, files: list[str], text_key: str) -> None:
        self.files = files
        self._text_key = text_key
        self.num_shards = len(files)

    def __iter__(self) -> Iterator[object]:
        return itertools.chain.from_iterable(map(self.shard, range(self.num_shards)))

    def shard(self, index: int) -> Iterator[object]:
        """Yield the documents of a file. Raises as `unreadable` says if it cannot be read."""
        path = self.files[index]
        with unpacked(path) as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    document = read_line(line, self._text_key, path, number)
                except BadDocumentError as error:
                    document = error
                yield document


def check_first(lines: Iterable[tuple[str, bytes]], text_key: str, files: list[str]) -> None:
    """Find a wrong `text_key` at the start, instead of blaming every line.

    Args:
        lines: the place and the content of each, of all files.

    Raises:
        DataError: the first line that is not blank is an object without that key, or there is none.
    """
    where, line = next(((where, line) for where, line in lines if line.strip()), ("", b""))
    if not line:
        others = " and the others" if len(files) > 1 else ""
        raise DataError(f"{files[0]!r}{others}: empty")
    try:
        row = parse_json(line)
    except ValueError:
        return
    if isinstance(row, dict):
        with begin_errors_with(where):
            check_key(text_key, row)


def is_array(path: str) -> bool:
    """Whether a file, perhaps compressed, is one JSON array. Raises as `unreadable` says."""
    with unpacked(path) as file:
        return file.read(4096).lstrip().startswith(b"[")


def _map(path: str) -> mmap.mmap | bytes:
    with reading(path), open(path, "rb") as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # an empty file
            return b""
