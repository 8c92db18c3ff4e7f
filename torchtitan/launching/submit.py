"""Passes rendered jobs to the tool that submits them."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from torchtitan.errors import ConfigError


def require(tool: str, install: str) -> None:
    """Raise `ConfigError` if `tool` is not on the PATH; `install` is the advice in the message."""
    if shutil.which(tool) is None:
        raise ConfigError(
            f"cannot submit: the command {tool!r} is missing. {install}, or render the job with "
            "--dry-run and submit it elsewhere"
        )


def run(words: list[str], text: str, environment: dict[str, str] | None = None) -> int:
    """Run a command that reads `text` from stdin. Return its exit code.

    Args:
        environment: its variables; None: those of this process.
    """
    return subprocess.run(words, input=text, text=True, env=environment).returncode


def run_on_file(words: list[str], text: str, name: str) -> int:
    """Run a command on a file `name` with `text`, the last argument. Return its exit code."""
    with tempfile.TemporaryDirectory(prefix="torchtitan-launch-") as folder:
        path = Path(folder, name)
        path.write_text(text)
        return subprocess.run([*words, str(path)]).returncode
