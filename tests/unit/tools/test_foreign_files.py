"""Files that others wrote: what is in them, or one message."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from torchtitan.errors import DataError, OutageError
from torchtitan.tools.foreign_files import read_json


def test_an_object_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": "é"}', encoding="utf-8")
    assert read_json(tmp_path / "a.json", DataError) == {"a": "é"}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is damaged"),
        (b"\xff", "is damaged"),
        (b"[]", "holds no JSON object"),
        (b'{"a": ' + b"[" * 500_000, "nested too deeply"),
        (b"1" * 5000, "is damaged"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path} .*{problem}"):
        read_json(path, DataError)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name, problem in [
        ("pipe", "not a file"),
        ("", "not a file"),
        ("none", "No such"),
        ("loop", ""),
    ]:
        with pytest.raises(DataError, match=f"cannot be read: .*{problem}"):
            read_json(tmp_path / name, DataError)


def test_an_outage_is_none_of_its_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> bytes:
        raise OSError(5, "Input/output error")

    (tmp_path / "a.json").touch()
    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(OutageError, match="Input/output error"):
        read_json(tmp_path / "a.json", DataError)
