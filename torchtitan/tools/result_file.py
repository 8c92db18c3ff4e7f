"""Writes files that are complete or absent, whenever the process is killed."""

from __future__ import annotations

import json
import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from torchtitan.errors import ConfigError, os_errors_as
from torchtitan.tools.foreign_files import is_folder


def require_folder(path: str | None, option: str) -> None:
    """Check, before the work is done, that its result can be written.

    Raises:
        ConfigError: the folder of `path` does not exist, or `path` is a folder.
    """
    if path is None:
        return
    if not is_folder(Path(path).expanduser().parent, ConfigError):
        raise ConfigError(f"{option} {path}: there is no such folder")
    if is_folder(Path(path).expanduser(), ConfigError):
        raise ConfigError(f"{option} {path}: a folder. Give a file")


def make_folder(folder: Path, option: str) -> None:
    """Create a folder for results, before the work is done.

    Raises:
        ConfigError: it cannot be created; `OutageError`: not now.
    """
    with os_errors_as(ConfigError, f"{option} {folder}: cannot write there"):
        folder.mkdir(parents=True, exist_ok=True)


def write_result(path: str, content: str | bytes, option: str) -> None:
    """Write a file. Raises `ConfigError` or `OutageError`, which name the option, if that fails."""
    data = content.encode(errors="replace") if isinstance(content, str) else content
    file = Path(path).expanduser()
    with os_errors_as(ConfigError, f"{option} {path}: cannot write there"):
        if file.is_symlink() or (file.exists() and not file.is_file()):  # such as /dev/stdout
            file.write_bytes(data)
        else:
            replace_file(file, data)


def write_json(path: str, content: Any, option: str) -> None:
    """Write JSON, in which null stands for NaN and infinities. Raises: see `write_result`."""
    finite = json.loads(json.dumps(content, default=str), parse_constant=lambda number: None)
    write_result(path, json.dumps(finite, indent=2) + "\n", option)


def replace_file(file: Path, data: bytes) -> None:
    """Write a file that appears when it is on disk, in place of an older one. Raises `OSError`."""
    partial = own_partial(file)
    try:
        with partial.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise


def own_partial(file: Path) -> Path:
    """Return a name that no other process writes to, in case two write the same file."""
    return file.with_name(f"{file.name}.{uuid.uuid4().hex[:12]}.partial")
