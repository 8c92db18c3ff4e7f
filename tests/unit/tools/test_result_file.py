"""Result files of commands: whole, or not there."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import pytest

from torchtitan.errors import ConfigError
from torchtitan.tools.result_file import write_json, write_result


def test_a_full_disk_leaves_the_older_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "page.html"
    write_result(str(file), "old", "--out")

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ConfigError, match=r"^--out .*page\.html: cannot write there: No space"):
        write_result(str(file), "new", "--out")
    assert list(tmp_path.iterdir()) == [file] and file.read_text() == "old"


def test_what_a_link_leads_to_is_written(tmp_path: Path) -> None:
    """As for /dev/stdout, and for a result that is kept elsewhere."""
    link, file = tmp_path / "link", tmp_path / "file"
    link.symlink_to(file)
    write_result(str(link), "new", "--out")
    assert link.is_symlink() and file.read_text() == "new"


def test_other_programs_can_read_numbers_that_are_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "loss.json"
    numbers = {"loss": 709.8, "perplexity": math.inf, "terms": [-math.inf, math.nan]}
    write_json(str(path), numbers, "--json")

    def refuse(number: str) -> None:
        raise ValueError(number)  # as JavaScript and jq do

    read = json.loads(path.read_text(), parse_constant=refuse)
    assert read == {"loss": 709.8, "perplexity": None, "terms": [None, None]}
