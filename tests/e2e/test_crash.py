"""A crash in native code, which Python cannot catch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CRASH = """
import ctypes
from torchtitan import train

def crash(self, stop):
    ctypes.string_at(0)

train.Trainer.train_step = crash
train.main(["--training.steps=1", "--model.flavor=debugmodel"])
"""


def test_a_crash_shows_where_python_stood(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CRASH], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode < 0
    assert "in crash" in done.stderr and "in train" in done.stderr
