from __future__ import annotations

import builtins
import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import datasets
import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchtitan.data.sources import (
    DATASETS,
    Source,
    TextFiles,
    find_files,
    first_document,
    open_dataset,
    register_dataset,
    stdlib_files,
)
from torchtitan.errors import BadDocumentError, ConfigError, DataError


class Rows:
    """Random access; an error stands for a malformed row."""

    def __init__(self, *rows: object) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> object:
        if isinstance(self._rows[index], BadDocumentError):
            raise self._rows[index]
        return self._rows[index]


def names(files: list[str], root: Path) -> list[str]:
    return [os.path.relpath(file, root) for file in files]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.txt", "a.md", "sub/c.txt", "sub/deep/d.txt", ".hidden", ".git/e.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path


def test_a_folder_means_all_files_below_it_but_hidden_ones(tree: Path) -> None:
    expected = ["a.md", "b.txt", "sub/c.txt", "sub/deep/d.txt"]
    assert names(find_files(str(tree)), tree) == expected
    assert names(find_files(str(tree), (".txt",)), tree) == expected[1:]


def test_a_file_or_a_glob_is_taken_whatever_its_suffix(tree: Path) -> None:
    assert names(find_files(str(tree / "a.md"), (".txt",)), tree) == ["a.md"]
    assert names(find_files(str(tree / "*.md"), (".txt",)), tree) == ["a.md"]
    assert names(find_files(f"{tree}/**/*.txt"), tree) == ["b.txt", "sub/c.txt", "sub/deep/d.txt"]


def test_a_folder_with_glob_characters_in_its_name_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "[x]").mkdir()
    (tmp_path / "[x]" / "a").write_text("a")
    assert names(find_files(str(tmp_path / "[x]")), tmp_path) == ["[x]/a"]


def test_a_file_that_links_lead_to_again_is_found_once(tree: Path) -> None:
    expected = names(find_files(str(tree)), tree)
    (tree / "loop").symlink_to(tree)
    (tree / "sub" / "z.txt").symlink_to("c.txt")
    assert names(find_files(str(tree)), tree) == expected
    assert names(find_files(f"{tree}/**/*.txt"), tree) == expected[1:]
    (tree / "sub" / "loop").symlink_to(tree)
    (tree / "nowhere").symlink_to("nowhere")
    assert names(find_files(str(tree)), tree) == expected


@pytest.mark.parametrize("call", ["stat", "lstat", "scandir"])
def test_files_of_a_folder_are_found_without_a_look_at_each(
    tree: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    looked, function = [], getattr(os, call)
    monkeypatch.setattr(
        os, call, lambda path, **more: looked.append(path) or function(path, **more)
    )
    find_files(str(tree))
    monkeypatch.undo()
    assert [path for path in looked if os.path.isfile(path)] == []


def test_zst_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fsspec.available_compressions", lambda: [None, "gzip"])
    (tmp_path / "a.jsonl.zst").write_text("")
    with pytest.raises(ConfigError, match=r"a\.jsonl\.zst: \.zst files need .*pip install zstand"):
        open_dataset("jsonl", str(tmp_path))


def test_the_home_folder_is_expanded(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tree))
    assert names(find_files("~/sub/c.txt"), tree) == ["sub/c.txt"]


@pytest.mark.parametrize("path", ["nowhere", "*.nothing", "empty"])
def test_no_file_is_an_error(tmp_path: Path, path: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"dataset_path = .*no such file that ends in \.x or \.y"):
        find_files(str(tmp_path / path), (".x", ".y"))


def test_a_path_is_needed() -> None:
    with pytest.raises(ConfigError, match="needs dataset_path"):
        open_dataset("text", None)


def test_an_unknown_dataset_gives_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean 'fineweb_edu'\? Allowed: arrow, c4,"):
        open_dataset("finewebedu", None)


def test_a_registered_dataset_is_opened_with_path_and_key(monkeypatch) -> None:
    monkeypatch.setattr("torchtitan.data.sources.DATASETS", dict(DATASETS))

    def factory(path: str | None, text_key: str) -> list[str]:
        return [f"{path} {text_key}"]

    register_dataset("own", factory)
    register_dataset("own", factory)
    assert open_dataset("own", "a", "b") == ["a b"]
    with pytest.raises(ValueError, match="'own' is already registered"):
        register_dataset("own", lambda path, text_key: [])


def test_each_text_file_is_a_document(tree: Path) -> None:
    source = open_dataset("text", str(tree))
    assert list(source) == ["a.md", "b.txt", "sub/c.txt", "sub/deep/d.txt"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text", encoding="utf-8-sig")
    assert open_dataset("text", str(tmp_path))[0] == "text"


def test_a_file_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "latin1.txt"
    path.write_bytes("eins\nzwei\ndr\xfci\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin1\.txt:3: not UTF-8 text"):
        TextFiles([str(path)])[0]
    with pytest.raises(DataError, match=r"latin1\.txt:3: not UTF-8 text"):
        list(TextFiles([str(path)], piece_bytes=4))


def test_a_file_that_vanished_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a")
    source = TextFiles([str(path)])
    path.unlink()
    with pytest.raises(DataError, match=r"a\.txt cannot be read: No such file"):
        source[0]
    with pytest.raises(DataError, match=r"a\.txt cannot be read: No such file"):
        TextFiles([str(path)])


def test_a_large_file_is_cut_at_line_ends(tmp_path: Path) -> None:
    lines = [f"line {i}\n" for i in range(100)]
    (tmp_path / "large").write_text("".join(lines))
    (tmp_path / "small").write_text("small")
    source = TextFiles([str(tmp_path / "large"), str(tmp_path / "small")], piece_bytes=50)
    pieces = list(source)
    assert pieces[-1] == "small"
    assert "".join(pieces[:-1]) == "".join(lines)
    assert len(pieces) == len(source) > 10
    assert all(piece.endswith("\n") and len(piece) < 100 for piece in pieces[:-1])


@given(text=st.text(alphabet="aé漢😀\n", max_size=60), piece_bytes=st.integers(4, 20))
def test_pieces_join_to_the_file(tmp_path_factory, text: str, piece_bytes: int) -> None:
    path = tmp_path_factory.mktemp("pieces") / "file"
    path.write_bytes(text.encode())
    pieces = list(TextFiles([str(path)], piece_bytes))
    assert "".join(pieces) == text
    assert all(len(piece.encode()) <= 2 * piece_bytes + 3 for piece in pieces)


def test_a_piece_is_read_about_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counted(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            part = super().read(size)
            sizes.append(len(part))
            return part

    sizes: list[int] = []
    text = b"".join(b"line %d\n" % i for i in range(20_000)) + b"long" * 20_000 + b"\nend"
    (tmp_path / "file").write_bytes(text)
    monkeypatch.setattr("torchtitan.data.sources.open_file", lambda path: Counted(text))
    source = TextFiles([str(tmp_path / "file")], piece_bytes=2**16)
    pieces = []
    for number in range(len(source)):
        sizes.clear()
        piece = source[number].encode()
        pieces.append(piece)
        if b"line" in piece and b"long" not in piece:
            assert sum(sizes) <= len(piece) + 2 * 2**14
    assert b"".join(pieces) == text and len(pieces) > 4


def test_of_a_huge_file_only_a_piece_is_read(tmp_path: Path) -> None:
    path = tmp_path / "huge"
    path.touch()
    os.truncate(path, 2**40)  # takes no space on the disk
    source = TextFiles([str(path)])
    assert len(source) == 2**20
    assert len(source[2**19]) == 2**20


def test_the_standard_library_is_split_for_good() -> None:
    train, held_out = stdlib_files(held_out=False), stdlib_files(held_out=True)
    assert not set(train) & set(held_out)
    assert 0.02 < len(held_out) / len(train + held_out) < 0.1
    assert train == sorted(train) and all(file.endswith(".py") for file in train)
    assert len(open_dataset("stdlib", None)) >= len(train)
    assert len(open_dataset("stdlib_validation", None)) >= len(held_out)


def test_the_standard_library_takes_no_path() -> None:
    with pytest.raises(ConfigError, match="dataset_path has no effect"):
        open_dataset("stdlib", "somewhere")


def test_an_interpreter_without_sources_is_an_error(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError, match=r"no library sources.*use `text`"):
        open_dataset("stdlib", None)


@pytest.fixture
def remote() -> str:
    """A folder in `fsspec`'s memory, as a bucket would be."""
    system = fsspec.filesystem("memory")
    for name, content in {
        "a.txt": "eins",
        "sub/b.txt": "zwei é",
        "lines.jsonl": '{"text": "a"}\n\n{"text": \n{"text": "b"}\n',
        "more.jsonl.gz": gzip.compress(b'{"text": "c"}\n'),
        ".hidden.txt": "no",
        "sub/.git/d.txt": "no",
    }.items():
        system.pipe(f"/bucket/{name}", content if isinstance(content, bytes) else content.encode())
    yield "memory://bucket"
    system.rm("/bucket", recursive=True)


def test_text_behind_a_url(remote: str) -> None:
    assert list(open_dataset("text", f"{remote}/a.txt")) == ["eins"]
    assert list(open_dataset("text", f"{remote}/**/*.txt")) == ["eins", "zwei é"]
    assert list(open_dataset("text", f"{remote}/.*.txt")) == ["no"]
    assert len(find_files(remote)) == len(find_files(f"{remote}/")) == 4
    with pytest.raises(DataError, match="there is no such file"):
        open_dataset("text", f"{remote}/nothing.txt")
    with pytest.raises(ConfigError, match=r"dataset_path = 'nosuch://x'.*nosuch"):
        open_dataset("text", "nosuch://x")


def test_json_lines_behind_a_url_are_streamed(remote: str) -> None:
    source = open_dataset("jsonl", remote)
    assert source.num_shards == 2
    first, blank, bad, last, packed = source
    assert (first, blank, last, packed) == ("a", "", "b", "c")
    assert isinstance(bad, BadDocumentError) and "lines.jsonl:3: not valid JSON" in str(bad)
    assert list(source.shard(1)) == ["c"]


def test_large_json_lines_are_read_where_they_lie(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("torchtitan.data.piece_ends._KEPT_FROM_BYTES", 1)
    rows = [{"text": f"é {i} \n" * (i % 4), "id": i} for i in range(500)]
    for name, part in (("a.jsonl", rows[:200]), ("b.jsonl", []), ("c.json", rows[200:])):
        (tmp_path / name).write_text("\n".join(map(json.dumps, part)))  # no end of line at the end
    for _ in range(2):  # the second time with the line ends in the cache
        source = open_dataset("jsonl", str(tmp_path))
        assert [source[i] for i in range(len(source))] == [row["text"] for row in rows]
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 2
    (tmp_path / "a.jsonl").write_text('{"text": "new"}\n')
    assert open_dataset("jsonl", str(tmp_path))[0] == "new"


def test_each_file_of_lines_costs_one_open_at_the_start(tmp_path: Path, monkeypatch) -> None:
    """Thousands of ranks open thousands of files of one file server at the same time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("torchtitan.data.piece_ends._KEPT_FROM_BYTES", 1)
    for number in range(9):
        (tmp_path / f"{number}.jsonl").write_text('{"text": "a"}\n' * number)
    open_dataset("jsonl", str(tmp_path))
    opened: list[str] = []
    plain_open = builtins.open

    def counted(file, *args, **kwargs):
        opened.append(Path(file).suffix)
        return plain_open(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", counted)
    assert len(open_dataset("jsonl", str(tmp_path))) == 36
    assert opened.count(".npy") == 8 + 1  # of the first that is not empty, also its first line
    assert opened.count(".jsonl") <= 3


def test_arrow_files_and_saved_folders(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({"text": ["a", "b"]})
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(
        tmp_path / "both"
    )

    def texts(path: str, split: str | None = None) -> list[str]:
        source = open_dataset("arrow", str(tmp_path / path), split=split)
        return [source[i] for i in range(len(source))]

    assert texts("saved") == ["a", "b"]
    assert texts("saved/*.arrow") == ["a", "b"]
    assert texts("both") == ["a", "b"]
    assert texts("both", "test") == ["b"]
    with pytest.raises(DataError, match=r"no split 'tset'. Did you mean 'test'"):
        texts("both", "tset")
    with pytest.raises(ConfigError, match="split = 'x' has no effect"):
        texts("saved", "x")


@pytest.mark.parametrize("name", ["copy", "copy:of 10:30"])
def test_a_hub_repository_is_a_dataset(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "a"}\n')
    (folder / "test.jsonl").write_text('{"text": "b"}\n')
    assert list(open_dataset("hf", str(folder))) == ["a"]
    assert list(open_dataset("hf", str(folder), split="test")) == ["b"]
    with pytest.raises(ConfigError, match="needs dataset_path: a repository"):
        open_dataset("hf", None)


def test_a_split_where_there_are_none_is_refused(tree: Path) -> None:
    with pytest.raises(ConfigError, match="split = 'test' has no effect here"):
        open_dataset("text", str(tree), split="test")


def test_rows_of_fields_are_refused_at_once() -> None:
    with pytest.raises(DataError, match="row of fields"):
        first_document([{"text": "a"}], skips=True)


@pytest.mark.parametrize("kind", [lambda *rows: Rows(*rows), lambda *rows: iter(rows)])
def test_the_first_document_is_neither_empty_nor_malformed(kind: Callable[..., Source]) -> None:
    rows = ["", BadDocumentError("line 2"), "text", BadDocumentError("line 4")]
    assert first_document(kind(*rows), skips=True) == "text"
    with pytest.raises(BadDocumentError, match="line 2"):
        first_document(kind(*rows), skips=False)
    assert first_document(kind("", rows[1]), skips=True) is None
