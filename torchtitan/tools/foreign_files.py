"""Reads files written by others, which may be damaged: returns the content, or raises one error."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from torchtitan.errors import TitanError, os_errors_as


def _reading(path: Path, mistake: type[TitanError]) -> AbstractContextManager[None]:
    return os_errors_as(mistake, f"{path} cannot be read")


def is_file(path: Path, mistake: type[TitanError]) -> bool:
    """Return whether there is such a file. Raises like `read_bytes` if that cannot be told.

    As in an outage, or for a folder that one may not enter. `Path.is_file` raises `OSError` then,
    or returns False (Python 3.14).
    """
    return _is_of_kind(path, mistake, stat.S_ISREG)


def is_folder(path: Path, mistake: type[TitanError]) -> bool:
    """Return whether there is such a folder. Raises like `is_file`."""
    return _is_of_kind(path, mistake, stat.S_ISDIR)


def exists(path: Path, mistake: type[TitanError]) -> bool:
    """Return whether there is such a file, folder or other thing. Raises like `is_file`."""
    return _is_of_kind(path, mistake, bool)


def _is_of_kind(path: Path, mistake: type[TitanError], is_kind: Callable[[int], bool]) -> bool:
    with _reading(path, mistake), suppress(FileNotFoundError, NotADirectoryError, ValueError):
        return is_kind(path.stat().st_mode)  # ValueError: a NUL in the path
    return False


def read_bytes(path: Path, mistake: type[TitanError]) -> bytes:
    """Return the content of a file.

    Raises:
        TitanError: a `mistake` if the file is missing, or no regular file (a pipe may never end);
            an `OutageError` if it cannot be read now.
    """
    with _reading(path, mistake):
        if not stat.S_ISREG(path.stat().st_mode):
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


def read_json_if_any(path: Path, mistake: type[TitanError]) -> dict[str, Any]:
    """Return the fields of a JSON object; none without such a file. Raises like `read_json`."""
    return read_json(path, mistake) if is_file(path, mistake) else {}


def parse_json(text: str | bytes) -> Any:
    """Call `json.loads`, but raise `ValueError` for input that is nested too deeply, too."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
