"""Reads files written by others, which may be damaged: returns the content, or raises one error."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torchtitan.errors import TitanError, outage_or


@contextmanager
def _reading(path: Path, mistake: type[TitanError]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise outage_or(mistake, f"{path} cannot be read: {error.strerror}", error) from error


def is_file(path: Path, mistake: type[TitanError]) -> bool:
    """Return whether there is such a file. Raises like `read_bytes` if that cannot be told.

    As in an outage, or for a folder that one may not enter. `Path.is_file` raises `OSError` then,
    or returns False (Python 3.14).
    """
    with _reading(path, mistake), suppress(FileNotFoundError, NotADirectoryError):
        return stat.S_ISREG(path.stat().st_mode)
    return False


def read_bytes(path: Path, mistake: type[TitanError]) -> bytes:
    """Return the content of a file.

    Raises:
        TitanError: a `mistake` if the file is missing, or no regular file (a pipe may never end);
            an `OutageError` if it cannot be read now.
    """
    with _reading(path, mistake):
        if path.exists() and not path.is_file():
            raise mistake(f"{path} cannot be read: it is not a file")
        return path.read_bytes()


def read_text(path: Path, mistake: type[TitanError]) -> str:
    """Return the text of a file in UTF-8. Raises like `read_bytes`, and a `mistake` for others."""
    try:
        return read_bytes(path, mistake).decode()
    except ValueError as error:
        raise mistake(f"{path} is damaged: {error}") from error


def read_json(path: Path, mistake: type[TitanError]) -> dict[str, Any]:
    """Return the fields of a file that holds a JSON object. Raises like `read_text`."""
    try:
        fields = parse_json(read_text(path, mistake))
    except ValueError as error:
        raise mistake(f"{path} is damaged: {error}") from error
    if not isinstance(fields, dict):
        raise mistake(f"{path} is damaged: it holds no JSON object")
    return fields


def parse_json(text: str | bytes) -> Any:
    """Call `json.loads`, but raise `ValueError` for input that is nested too deeply, too."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
