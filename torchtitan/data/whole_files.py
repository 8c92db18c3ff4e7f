"""Writes files atomically: they are complete or absent, whenever the process is killed."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from torchtitan.errors import ConfigError


class FileWriter:
    """A file that gets its name once it is complete, with the hash of its content."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = _own_partial(path)
        self._digest = hashlib.sha256()
        self._file: BinaryIO

    def __enter__(self) -> FileWriter:
        self._file = writing(self._partial.open, "wb")
        return self

    def write(self, array: np.ndarray) -> None:
        content = array.tobytes()
        self._digest.update(content)
        writing(self._file.write, content)

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is not None:
            self._file.close()
            self._partial.unlink(missing_ok=True)
            return
        writing(self._file.flush)
        writing(os.fsync, self._file.fileno())
        self._file.close()
        writing(os.replace, self._partial, self._path)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


def _own_partial(path: Path) -> Path:
    """Return a name that no other process writes to, in case two write the same file."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.partial")


def writing(function: Callable[..., Any], *args: Any) -> Any:
    """Return `function(*args)`. Raises `ConfigError` if the disk refuses."""
    try:
        return function(*args)
    except OSError as error:
        raise ConfigError(f"--out: cannot write there: {error}") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically. Raises `ConfigError`."""
    partial = _own_partial(path)
    writing(partial.write_text, json.dumps(content, indent=1) + "\n")
    writing(os.replace, partial, path)
