"""Where a program runs: versions, machine, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torchtitan

ENVIRONMENT_FILE = "environment.json"
"""A run keeps what `environment` says, and its number of processes, beside its config."""


def environment() -> dict[str, str]:
    """Facts about this process, by their names."""
    import torch

    from torchtitan.distributed.utils import device_type

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
    """` (commit)` if the package is a git checkout; `-dirty` if it has changes."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    folder = Path(torchtitan.__file__).parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return f" ({done.stdout.strip()})" if done.returncode == 0 else ""
