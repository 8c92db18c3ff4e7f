"""Mapped files: how they are read ahead, and how many are mapped at a time."""

from __future__ import annotations

import errno
import mmap
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from torchtitan.cli import main
from torchtitan.data import mapped
from torchtitan.data.mapped import map_file, read_ahead
from torchtitan.data.prepared_tokens import PreparedTokens
from torchtitan.data.sources import open_dataset
from torchtitan.errors import DataError


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> mapped.Pool:
    pool = mapped.Pool()
    for user in ("prepared_tokens", "json_lines"):
        monkeypatch.setattr(f"torchtitan.data.{user}.SHARDS", pool)
    return pool


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six shards, of one document each."""
    root = tmp_path_factory.mktemp("tokens")
    lines = "".join(f'{{"text": "document {i}"}}\n' for i in range(6))
    (root / "lines.jsonl").write_text(lines)
    words = ["--dataset", "jsonl", "--dataset-path", str(root / "lines.jsonl"), "--workers", "1"]
    assert main(["data", "prepare", "--out", str(root / "out"), *words]) == 0
    return root / "out"


def maps_of(path: Path) -> str:
    return "".join(Path("/proc/self/smaps").read_text().split(str(path))[1:])


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/smaps")
def test_only_what_is_touched_is_read(tmp_path: Path) -> None:
    np.arange(5000).tofile(tmp_path / "a.bin")
    array = map_file(tmp_path / "a.bin", "<i8", 80)
    assert array.tolist() == list(range(10, 5000)) and not array.flags.writeable
    flags = re.search("VmFlags: (.*)", maps_of(tmp_path / "a.bin"))
    assert flags is not None and "rr" in flags[1].split()  # MADV_RANDOM


def test_a_long_document_is_read_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, ...]] = []

    class Recorded(mmap.mmap):
        def madvise(self, option: int, *where: int) -> None:
            if option == mmap.MADV_WILLNEED:
                asked.append(where)
            super().madvise(option, *where)

    monkeypatch.setattr("mmap.mmap", Recorded)
    np.arange(100_000).tofile(tmp_path / "a.bin")
    array = map_file(tmp_path / "a.bin", "<i8", 80)
    assert read_ahead(array, 0, 5).tolist() == list(range(10, 15))
    assert not asked  # one page
    assert read_ahead(array, 1000, 41_000).tolist() == list(range(1010, 41_010))
    covered = {page for at, n in asked for page in range(at // 4096, -(-(at + n) // 4096))}
    assert covered == set(range(1010 * 8 // 4096, -(-41_010 * 8 // 4096)))
    assert max(n for _, n in asked) == 2**17
    assert read_ahead(np.arange(9), 2, 4).tolist() == [2, 3]


def test_few_shards_are_mapped_at_a_time(
    folder: Path, pool: mapped.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "most_shards", lambda: 2)
    sources = [PreparedTokens(folder), PreparedTokens(folder)]
    assert len(pool) == 0  # a mixture may be of more shards than can be mapped
    for source in sources:
        for index in (0, 5, 3, 3, 1, 0):
            text = bytes(source[index][:-1].astype(np.uint8)).decode()
            assert text == f"document {index}"
            assert len(pool) <= 2
    assert len(pool) == 2


def test_documents_in_use_keep_no_file_open(
    folder: Path, pool: mapped.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run holds a document for each row, or a pool of them for best-fit packing."""
    monkeypatch.setattr(mapped, "most_shards", lambda: 2)
    source = PreparedTokens(folder)
    documents = [source[index] for index in range(6)]
    mappings = Path("/proc/self/maps").read_text().count(str(folder))
    assert len(documents) == 6 and mappings <= 2 * 2


def test_json_lines_of_many_files_are_mapped_as_they_are_used(
    tmp_path: Path, pool: mapped.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "most_shards", lambda: 2)
    for number in range(6):
        (tmp_path / f"{number}.jsonl").write_text(f'{{"text": "{number}"}}\n' * 2)
    source = open_dataset("jsonl", str(tmp_path))
    assert len(pool) == 1  # the first file is looked at
    for _ in range(2):
        assert [source[index] for index in range(12)] == [str(i // 2) for i in range(12)]
    assert len(pool) == 2
    (tmp_path / "0.jsonl").write_text('{"text": "0"}\n')
    with pytest.raises(DataError, match=r"0\.jsonl has changed while it was read"):
        source[0]


def test_the_limit_of_open_files_bounds_the_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, shards in ((1024, 256), (20_000, 5000), (2**20, 8192), (-1, 8192)):
        monkeypatch.setattr("resource.getrlimit", lambda kind, limit=limit: (limit, limit))
        assert mapped.most_shards() == shards


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM])
def test_too_many_mappings_are_no_outage(
    folder: Path, pool: mapped.Pool, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    source = PreparedTokens(folder)
    monkeypatch.setattr("mmap.mmap", fail)
    with pytest.raises(DataError, match=r"shard-0.*ulimit -Hn.*vm\.max_map_count.*--shards"):
        source[0]


def test_ranks_of_a_host_share_out_the_sizes_to_look_at(
    folder: Path, pool: mapped.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (folder / "shard-00003.bin").read_bytes()
    (folder / "shard-00003.bin").write_bytes(content[:-2])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "2")
    source = PreparedTokens(folder)
    with pytest.raises(DataError, match=r"shard-00003\.bin has changed"):
        source[3]  # when it is used at the latest
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(DataError, match=r"shard-00003\.bin has changed"):
        PreparedTokens(folder)
    (folder / "shard-00003.bin").write_bytes(content)
