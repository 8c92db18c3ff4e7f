"""Describes the environment of a program: versions, machine, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torchtitan

ENVIRONMENT_FILE = "environment.json"
"""A run saves the facts of `environment`, and its number of processes, beside its config."""


def environment() -> dict[str, str]:
    """Return facts about this process, by name."""
    import torch

    from torchtitan.runtime.device import device_type

    device = torch.cuda.get_device_name() if device_type() == "cuda" else platform.machine()
    return {
        "torchtitan": torchtitan.__version__ + _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "host": platform.node(),
        "device": f"{device_type()} ({device})",
        "CPU cores": str(os.cpu_count()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "unset"),
    }


def _commit() -> str:
    """Return ` (commit)` if the package is a git checkout; `-dirty` if it has changes."""
    package = Path(torchtitan.__file__).resolve().parent
    top = _git(package, "rev-parse", "--show-toplevel")
    # Ignore the repository of a project that has the package installed below it.
    if not top or Path(top).resolve() != package.parent:
        return ""
    commit = _git(package, "describe", "--always", "--dirty", "--exclude=*")
    return f" ({commit})" if commit else ""


def _git(folder: Path, *words: str) -> str:
    """Return git's output in the folder; empty if it fails."""
    try:
        done = subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, timeout=10
        )
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
