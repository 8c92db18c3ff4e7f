"""Where the pieces of a large file end: found once, by one of those that ask."""

from __future__ import annotations

import errno
import resource
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from torchtitan.data import piece_ends
from torchtitan.data.piece_ends import ends_of


def ask(path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many of four that ask at once look for the ends."""
    looked, found = [], []
    find = piece_ends._find_ends

    def slow(*args) -> np.ndarray:
        looked.append(1)
        time.sleep(0.2)
        return find(*args)

    monkeypatch.setattr(piece_ends, "_find_ends", slow)
    monkeypatch.setattr(piece_ends, "_BETWEEN_LOOKS", 0.01)
    start = threading.Barrier(4)

    def run() -> None:
        start.wait()
        found.append(ends_of(str(path), ord("\n")))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(ends.tolist() == [2**20, 2**20 + 5] for ends in found)
    return len(looked)


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "a.jsonl"
    path.write_bytes(b" " * (2**20 - 1) + b"\n" + b"12345")
    return path


def test_one_looks_and_the_others_wait(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(large, monkeypatch) == 1
    kept = [path.suffix for path in (large.parent / "cache").rglob("*") if path.is_file()]
    assert kept == [".npy"]


def test_a_full_disk_keeps_no_part_of_them(large: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, hard))
    try:
        assert ends_of(str(large), ord("\n")).tolist() == [2**20, 2**20 + 5]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [path for path in (large.parent / "cache").rglob("*") if path.is_file()]


def test_all_look_where_nothing_can_be_kept(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piece_ends, "_keep", lambda path, array: None)
    began = time.monotonic()
    assert ask(large, monkeypatch) == 4
    assert time.monotonic() - began < 0.7  # the first, then the others at once


@pytest.mark.parametrize("refused", ["locks", "folder"])
def test_all_look_without_locks(large: Path, monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    def flock(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    if refused == "locks":
        monkeypatch.setattr("fcntl.flock", flock)
    else:
        (large.parent / "cache").touch()
    assert ask(large, monkeypatch) == 4


def test_whoever_waits_long_asks_for_the_lock_less_often(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(piece_ends, "try_lock", lambda file: sum(pauses) >= 600)
    assert ends_of(str(large), ord("\n")).tolist() == [2**20, 2**20 + 5]
    assert pauses[0] == 0.2 and max(pauses) == 5 and len(pauses) < 150


def test_of_a_small_file_nothing_is_looked_for_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(piece_ends, "_load", lambda path: pytest.fail("nothing is kept of it"))
    (tmp_path / "a.jsonl").write_bytes(b"1\n23")
    assert ends_of(str(tmp_path / "a.jsonl"), ord("\n")).tolist() == [2, 4]
