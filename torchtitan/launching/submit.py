"""Hands what was rendered to the tool that submits it."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from torchtitan.errors import ConfigError


def require(tool: str, install: str) -> None:
    """Raises `ConfigError` if `tool` is not on the PATH; `install` says what to do."""
    if shutil.which(tool) is None:
        raise ConfigError(
            f"cannot submit: no command {tool!r} here. {install}, or render the job with --dry-run "
            "and submit it elsewhere"
        )


def run(words: list[str], text: str) -> int:
    """Run a command that reads `text` from stdin. Returns its exit code."""
    return subprocess.run(words, input=text, text=True).returncode


def run_on_file(words: list[str], text: str, name: str) -> int:
    """Run a command whose last argument is a file with `text`, called `name`."""
    with tempfile.TemporaryDirectory(prefix="torchtitan-launch-") as folder:
        path = Path(folder, name)
        path.write_text(text)
        return subprocess.run([*words, str(path)]).returncode
