"""Writes files atomically: they are complete or absent, whenever the process is killed."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from torchtitan.errors import ConfigError, os_errors_as
from torchtitan.tools.result_file import own_partial, replace_file


class FileWriter:
    """A file that gets its name once it is complete, with the hash of its content."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = own_partial(path)
        self._digest = hashlib.sha256()
        self._file: BinaryIO

    def __enter__(self) -> FileWriter:
        with writing(self._path):
            self._file = self._partial.open("wb")
        return self

    def write(self, content: bytes) -> None:
        self._digest.update(content)
        with writing(self._path):
            self._file.write(content)

    def __exit__(self, kind: object, *rest: object) -> None:
        try:
            if kind is None:
                with writing(self._path):
                    self._file.flush()
                    os.fsync(self._file.fileno())
                    self._partial.replace(self._path)
        finally:
            with suppress(OSError):  # a full disk refuses what is left in the buffer
                self._file.close()
            with suppress(OSError):  # mostly that it has got its name
                self._partial.unlink()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


def writing(path: Path) -> AbstractContextManager[None]:
    """Wrap code that writes a file. Raises `ConfigError`, or `OutageError`, if the disk refuses."""
    return os_errors_as(ConfigError, f"--out: cannot write {path}")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically. Raises like `writing`."""
    with writing(path):
        replace_file(path, (json.dumps(content, indent=1) + "\n").encode())
