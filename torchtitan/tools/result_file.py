"""Writes result files of commands."""

from __future__ import annotations

from pathlib import Path

from torchtitan.errors import ConfigError


def require_folder(path: str | None, option: str) -> None:
    """Check, before the work is done, that its result can be written.

    Raises:
        ConfigError: the folder of `path` does not exist, or `path` is a folder.
    """
    if path is None:
        return
    if not Path(path).expanduser().parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no such folder")
    if Path(path).expanduser().is_dir():
        raise ConfigError(f"{option} {path}: a folder. Give a file")


def make_folder(folder: Path, option: str) -> None:
    """Create a folder for results, before the work is done.

    Raises:
        ConfigError: it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{option} {folder}: cannot write there: {error.strerror}") from error


def write_result(path: str, content: str | bytes, option: str) -> None:
    """Write a file. Raises `ConfigError`, which names the option, if that fails."""
    data = content.encode(errors="replace") if isinstance(content, str) else content
    try:
        Path(path).expanduser().write_bytes(data)
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot write there: {error.strerror}") from error
