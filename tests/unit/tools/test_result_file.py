"""Result files of commands: whole, or not there."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from torchtitan.errors import OutageError
from torchtitan.tools.result_file import write_result


def test_a_full_disk_leaves_the_older_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, write_bytes = tmp_path / "page.html", Path.write_bytes
    write_result(str(file), "old", "--out")

    def write_half(path: Path, content: bytes) -> None:
        write_bytes(path, content[:1])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(OutageError, match=r"^--out .*page\.html: cannot write there: No space"):
        write_result(str(file), "new", "--out")
    assert list(tmp_path.iterdir()) == [file] and file.read_text() == "old"


def test_what_a_link_leads_to_is_written(tmp_path: Path) -> None:
    """As for /dev/stdout, and for a result that is kept elsewhere."""
    link, file = tmp_path / "link", tmp_path / "file"
    link.symlink_to(file)
    write_result(str(link), "new", "--out")
    assert link.is_symlink() and file.read_text() == "new"
