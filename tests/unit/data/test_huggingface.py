"""Local tables, and streams of local folders by the code that streams from the hub."""

from __future__ import annotations

import errno
import gzip
import itertools
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from harness import train_on_c4

from torchtitan.components.tokenizer import BytesTokenizer
from torchtitan.config import JobConfig
from torchtitan.data import DataLoader, build, build_dataloader
from torchtitan.data.encode import Encoder
from torchtitan.data.sources import open_dataset
from torchtitan.errors import BadDocumentError, DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def json_lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def texts(count: int, start: int = 0) -> list[dict]:
    return [{"text": f"text {i} é", "id": i} for i in range(start, start + count)]


def load(kind: str, path: Path) -> DataLoader:
    """The loader that a run would have, which reads ahead in its thread."""
    config = JobConfig()
    config.training.dataset, config.training.dataset_path = kind, str(path)
    config.training.local_batch_size, config.training.seq_len = 1, 8
    return build_dataloader(config, BytesTokenizer(), 0, 1)


def read_on(loader: DataLoader) -> None:
    list(itertools.islice(loader, 20))


def test_json_lines_are_a_table(folder: Path) -> None:
    (folder / "a.jsonl").write_bytes(json_lines(*texts(3)))
    (folder / "b.json.gz").write_bytes(gzip.compress(json_lines(*texts(2, start=3))))
    (folder / "README.md").write_text("not data")
    source = open_dataset("jsonl", str(folder))
    assert [source[i] for i in range(len(source))] == [row["text"] for row in texts(5)]


def test_parquet_is_a_table_and_the_key_of_the_text_can_be_chosen(folder: Path) -> None:
    table = pa.table({"content": ["a", "b"], "text": ["x", "y"]})
    pq.write_table(table, folder / "a.parquet")
    source = open_dataset("parquet", str(folder), "content")
    assert [source[i] for i in range(len(source))] == ["a", "b"]


def test_a_part_of_parquet_may_be_empty(folder: Path) -> None:
    for number, content in enumerate(([], ["a", "b"], [])):
        table = pa.table({"text": pa.array(content, pa.string())})
        pq.write_table(table, folder / f"{number}.parquet")
    source = open_dataset("parquet", str(folder))
    assert [source[i] for i in range(len(source))] == ["a", "b"]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_name_with_glob_characters_is_no_glob(folder: Path, kind: str) -> None:
    for name in ("a1", "a[1]"):
        if kind == "parquet":
            pq.write_table(pa.table({"text": [name]}), folder / f"{name}.parquet")
        else:
            (folder / f"{name}.jsonl").write_text(json.dumps([{"text": name}]))
    source = open_dataset(kind, str(folder / f"a[1].{kind}"))
    assert [source[i] for i in range(len(source))] == ["a[1]"]


def test_of_parquet_only_the_column_of_the_text_is_copied(folder: Path, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    for number in range(2):
        table = pa.table({"messages": [messages], "a.b": ["dots"], "other": ["x" * 10**6]})
        pq.write_table(table, folder / f"{number}.parquet")
    for key, first in (("messages", messages), ("a.b", "dots")):
        source = open_dataset("parquet", str(folder), key)
        assert len(source) == 2 and source[1] == first
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*")) < 10**5
    with pytest.raises(DataError, match=r"'text': no such field.* Allowed: a\.b, messages, other"):
        open_dataset("parquet", str(folder))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_cache_does_not_pass_by_itself(folder: Path, monkeypatch, number: int) -> None:
    def from_generator(*args: object, **options: object) -> None:
        try:
            raise OSError(number, os.strerror(number))
        except OSError as error:
            raise RuntimeError("An error occurred while generating the dataset") from error

    (folder / "a.jsonl.gz").write_bytes(gzip.compress(json_lines({"text": "a"})))
    monkeypatch.setattr("datasets.Dataset.from_generator", from_generator)
    with pytest.raises(DataError, match=rf"a\.jsonl\.gz'.*Errno {number}.*HF_HOME") as caught:
        open_dataset("jsonl", str(folder))
    assert caught.value.exit_code == 2


BROKEN_LINES = {
    "broken": (b'{"text": "a"}\n\n{"text": "b"\n{"text": "c"}\n', r"a\.jsonl:3: not valid JSON"),
    "no object": (json_lines({"text": "a"}, ["b"]), r"a\.jsonl:2: must be a JSON object"),
    "not UTF-8": (b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl:2: not UTF-8"),
    "surrogate": (b'{"text": "\\ud800"}\n', r"a\.jsonl:1: not Unicode"),
    "null": (json_lines({"text": "a"}, {"text": None}), r"a\.jsonl:2: .*'text' is missing"),
    "no field": (json_lines({"text": "a"}, {"id": 1}), r"a\.jsonl:2: text_key = 'text'"),
    "number": (json_lines({"text": 5}), r"a\.jsonl:1: .*'text' is int, not text"),
    "empty file": (b"", r"a\.jsonl': empty"),
    "blank lines": (b"\n\n", r"a\.jsonl': empty"),
    "empty texts": (json_lines({"text": ""}), r"empty: it has no document with text"),
}


@pytest.mark.parametrize("case", BROKEN_LINES)
def test_a_bad_line_is_named_with_file_and_line(folder: Path, case: str) -> None:
    content, message = BROKEN_LINES[case]
    (folder / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=rf"^training\.dataset = 'jsonl': .*{message}"):
        read_on(load("jsonl", folder))


def test_a_wrong_text_key_gives_the_nearest(folder: Path) -> None:
    (folder / "a.jsonl").write_bytes(json_lines({"texts": "a", "url": "b"}))
    with pytest.raises(DataError, match=r"text_key = 'text'.*Did you mean 'texts'\? Allowed: te"):
        open_dataset("jsonl", str(folder))


def test_a_truncated_gzip_file_is_named(folder: Path) -> None:
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(json_lines(*texts(2000)))[:200])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz cannot be read"):
        open_dataset("jsonl", str(folder))


@pytest.mark.parametrize("content", [b"", b"PAR1 and then something else"])
def test_a_damaged_parquet_file_is_named(folder: Path, content: bytes) -> None:
    (folder / "a.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"^training\.dataset = 'parquet'.*a\.parquet' cannot be"):
        load("parquet", folder)


def test_a_row_of_parquet_without_text_is_numbered(folder: Path) -> None:
    pq.write_table(pa.table({"text": ["a", None]}), folder / "a.parquet")
    with pytest.raises(DataError, match=r"row 1 \(from 0\): the field 'text' is missing"):
        read_on(load("parquet", folder))


def test_a_bad_line_of_compressed_ones_is_told_when_it_is_taken(folder: Path) -> None:
    lines = b'{"text": "a"}\n\n{"text": null}\n{"text": \n{"text": "b"}\n'
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    source = open_dataset("jsonl", str(folder))
    assert (len(source), source[0], source[3]) == (4, "a", "b")
    for row, problem in (
        (2, r"a\.jsonl\.gz:4: not valid JSON"),
        (1, r"gz:3: the field 'text' is m"),
    ):
        with pytest.raises(BadDocumentError, match=problem):
            source[row]


def test_a_compressed_array_is_a_table(folder: Path) -> None:
    rows = json.dumps([{"text": "a", "id": 1}, {"text": "b", "id": 2}])
    (folder / "a.json.gz").write_bytes(gzip.compress(rows.encode()))
    source = open_dataset("jsonl", str(folder))
    assert [source[i] for i in range(len(source))] == ["a", "b"]


@pytest.mark.parametrize(("lines", "problem"), [([{"texts": "a"}], "'texts'"), ([], "empty")])
def test_the_first_of_compressed_lines_is_looked_at(folder: Path, lines, problem) -> None:
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(b"\n" + json_lines(*lines)))
    with pytest.raises(DataError, match=problem):
        open_dataset("jsonl", str(folder))


def test_other_fields_of_compressed_lines_may_differ(folder: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "é", "cost": 1}]
    rows = [{"text": "a", "messages": turns, "id": 1}, {"text": "b", "id": 2, "messages": turns}]
    other = [{"id": "abc-1", "text": "c", "messages": [turns[0] | {"cost": "none"}, turns[1]]}]
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(json_lines(*rows) + b"\n"))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(json_lines(*other)))
    source = open_dataset("jsonl", str(folder))
    assert [source[i] for i in range(len(source))] == ["a", "b", "c"]
    source = open_dataset("jsonl", str(folder), "messages")
    assert [source[i] for i in range(len(source))] == [row["messages"] for row in (*rows, *other)]
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(json_lines(*other, {"text": "d"})))
    assert open_dataset("jsonl", str(folder))[3] == "d"


@pytest.fixture
def c4(folder: Path) -> Path:
    """A copy of a part of `allenai/c4`: its layout, names and fields."""
    (folder / "en").mkdir()
    for split, files in (("train", 16), ("validation", 1)):
        for number in range(files):
            rows = [
                {"text": f"{split} {number} {i}", "timestamp": "2019-04-25T12:57:54Z", "url": "u"}
                for i in range(5)
            ]
            name = f"c4-{split}.{number:05d}-of-{files:05d}.json.gz"
            (folder / "en" / name).write_bytes(gzip.compress(json_lines(*rows)))
    return folder


def test_c4_is_streamed_from_a_local_copy(c4: Path) -> None:
    train = open_dataset("c4", str(c4))
    assert list(train) == [f"train {n} {i}" for n in range(16) for i in range(5)]
    assert list(train) == list(train)
    assert train.num_shards == 16
    assert list(train.shard(3)) == [f"train 3 {i}" for i in range(5)]
    validation = open_dataset("c4_validation", str(c4))
    assert list(validation) == [f"validation 0 {i}" for i in range(5)]


def test_ranks_share_the_files_of_a_stream_and_resume(c4: Path) -> None:
    def loaders(ranks: int) -> list[DataLoader]:
        source = open_dataset("c4", str(c4))
        return [
            DataLoader(
                source, Encoder(BytesTokenizer()), 16, 1, 4, dp_rank=rank, dp_world_size=ranks
            )
            for rank in range(ranks)
        ]

    def step(loaders: list[DataLoader]) -> list[list[int]]:
        return [
            next(loader)["tokens"][0].tolist()
            for loader in loaders
            for _ in range(loader.gradient_accumulation_steps)
        ]

    one, two = loaders(1), loaders(2)
    assert [step(two) for _ in range(40)] == [step(one) for _ in range(40)]  # beyond the end
    rows = one[0].state_dict()["rows"]
    assert rows.shape == (4, 4) and (rows[:, 2] > 0).all()  # not in the lanes' first files
    resumed = loaders(2)
    for rank, loader in enumerate(resumed):
        loader.load_state_dict({"rows": rows[2 * rank : 2 * rank + 2]})
    assert [step(resumed) for _ in range(10)] == [step(one) for _ in range(10)]


def test_rank_zero_alone_asks_the_hub(c4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told, load_dataset, asked = [], datasets.load_dataset, Mock()

    def ask(*args: object, **options: object) -> object:
        asked()
        return load_dataset(*args, **options)

    def as_rank_zero(function: Callable[[], object], group: object) -> object:
        told.append(pickle.dumps(result := function()))  # as it is sent to the others
        return result

    monkeypatch.setattr(datasets, "load_dataset", ask)
    monkeypatch.setattr(build, "on_rank_zero", as_rank_zero)
    first = load("c4", c4)
    asked.assert_called_once()
    monkeypatch.setattr(build, "on_rank_zero", lambda *_: pickle.loads(told[0]))
    other = load("c4", c4)
    asked.assert_called_once()
    for one, two in itertools.islice(zip(first, other, strict=True), 20):
        assert torch.equal(one["tokens"], two["tokens"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": "b"\n', r"data' cannot be read.*JSON parse error"),
        (json_lines({"text": "a"}, {"text": None}), r"data', row 1 \(from 0\).*is missing"),
        (json_lines({"txt": "a"}), r"text_key = 'text'.*Did you mean 'txt'"),
        (b"", r"empty"),
        (b"\n", r"empty: it has no document with text"),
    ],
)
def test_bad_streams_are_refused(folder: Path, content: bytes, message: str) -> None:
    (folder / "train.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=rf"^training\.dataset = 'c4': .*{message}"):
        read_on(load("c4", folder))


def test_a_folder_without_the_split_is_an_error(folder: Path) -> None:
    (folder / "train.jsonl").write_bytes(json_lines(*texts(2)))
    with pytest.raises(DataError, match=r"validation.*train"):
        open_dataset("c4_validation", str(folder))


def test_without_a_network_the_run_ends_with_one_message(tmp_path: Path) -> None:
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = train_on_c4(tmp_path, env)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: training.dataset = 'c4': 'allenai/c4': the Hugging Face hub")
    assert "could not be reached" in last and "`stdlib`" in last and "dataset_path" in last
