"""The output folder of a conversion or an average."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from torchtitan.commands.convert.output import new_folder


def test_a_folder_appears_when_its_files_are_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    fsync, rename = os.fsync, Path.rename

    def spy_fsync(descriptor: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def spy_rename(path: Path, target: Path) -> Path:
        events.append(f"{path} -> {target}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "rename", spy_rename)
    out = tmp_path / "new" / "out"
    with new_folder(out) as partial:
        (partial / "config.json").write_text("{}")
    assert events == [
        str(tmp_path),
        str(partial / "config.json"),
        str(partial),
        f"{partial} -> {out}",
        str(out.parent),
    ]
