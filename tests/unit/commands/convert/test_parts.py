"""Copies from file to file tell which of the two failed."""

from __future__ import annotations

from io import FileIO
from pathlib import Path

import pytest

from torchtitan.commands.convert.parts import copy_bytes
from torchtitan.components.checkpoint import retry
from torchtitan.errors import OutageError


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux")
def test_a_source_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "RETRY_AFTER", ())
    found = pytest.raises(OutageError, match=r"^/proc/self/mem cannot be read: ")
    with FileIO("/proc/self/mem") as source, FileIO(tmp_path / "to", "w") as target, found:
        copy_bytes(source, 0, target, 0, 8)


def test_a_target_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "from").write_bytes(bytes(8))
    found = pytest.raises(OSError, match="Bad file descriptor")
    with FileIO(tmp_path / "from") as source, FileIO(tmp_path / "from") as target, found:
        copy_bytes(source, 0, target, 0, 8)
