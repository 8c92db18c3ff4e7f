"""`torchtitan data prepare` and what reads its folders, run as a user does."""

from __future__ import annotations

import errno
import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from torchtitan.cli import main
from torchtitan.components.tokenizer import BytesTokenizer, HuggingFaceTokenizer
from torchtitan.data import sources
from torchtitan.data.command import main as main_of_data
from torchtitan.data.encode import Encoder
from torchtitan.data.piece_ends import try_lock
from torchtitan.data.prepare import _count_parts, _lock, _write_index
from torchtitan.data.prepared_tokens import PreparedTokens
from torchtitan.data.sources import open_dataset
from torchtitan.data.whole_files import FileWriter
from torchtitan.errors import ConfigError, DataError

TEXTS = [f"document {i} é\n" * (i % 9) for i in range(300)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return folder


def prepare(out: Path, *options: str) -> None:
    assert main(["data", "prepare", "--out", str(out), *options]) == 0


@pytest.mark.parametrize("extra", [70_000, ~5])
def test_ids_that_its_files_cannot_hold_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: int
) -> None:
    own = {"own": lambda path, text_key: [np.array([1, extra, 2])]}
    monkeypatch.setattr(sources, "DATASETS", sources.DATASETS | own)
    options = ["--dataset", "own", "--tokenizer-path", "bytes", "--workers", "1"]
    with pytest.raises(DataError, match="Prepared tokens are from 0 to 65535"):
        main_of_data(["prepare", "--out", str(tmp_path / "out"), *options])


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_the_documents_are_those_of_the_source(
    lines: Path, tmp_path: Path, bpe: Path, kind: str, workers: int
) -> None:
    tokenizer = BytesTokenizer() if kind == "bytes" else HuggingFaceTokenizer(bpe)
    path = "bytes" if kind == "bytes" else str(bpe)
    options = ["--dataset", "jsonl", "--dataset-path", str(lines), "--tokenizer-path", path]
    prepare(tmp_path / "out", *options, "--workers", str(workers), "--shards", "7")
    source = open_dataset("tokens", str(tmp_path / "out"))
    expected = [Encoder(tokenizer)(text).tolist() for text in TEXTS if text]
    assert [source[i].tolist() for i in range(len(source))] == expected
    assert source.num_tokens == sum(map(len, expected))
    source.use_tokenizer(tokenizer)
    source.verify()


def test_any_number_of_processes_writes_the_same_bytes(lines: Path, tmp_path: Path) -> None:
    for workers in ("1", "2"):
        options = ["--dataset", "jsonl", "--dataset-path", str(lines), "--workers", workers]
        prepare(tmp_path / workers, *options)
    files = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "2").iterdir())
    assert not [name for name in files if name.endswith(".partial")]
    for name in files:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_a_stream_is_prepared_too_and_opened_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, asked, load_dataset = tmp_path / "data", tmp_path / "asked", datasets.load_dataset

    def ask(*args: object, **options: object) -> object:
        with asked.open("a") as file:  # of all processes
            file.write(".")
        return load_dataset(*args, **options)

    data.mkdir()
    for number in range(3):
        rows = [json.dumps({"text": f"{number} {i}"}) for i in range(5)]
        (data / f"train-{number}.jsonl").write_text("\n".join(rows))
    options = ["--dataset", "hf", "--dataset-path", str(data)]
    with pytest.raises(ConfigError, match=r"--shards 4: has no effect on.*per file \(3\)"):
        main_of_data(["prepare", "--out", str(tmp_path / "out"), *options, "--shards", "4"])
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(datasets, "load_dataset", ask)
    prepare(tmp_path / "out", *options, "--shards", "3")
    assert asked.read_text() == "."
    source = open_dataset("tokens", str(tmp_path / "out"))
    texts = [BytesTokenizer().decode(source[i].tolist()) for i in range(len(source))]
    assert texts == [f"{number} {i}" for number in range(3) for i in range(5)]


def test_many_files_share_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchtitan.data.prepare._MOST_SHARDS", 3)
    data = tmp_path / "data"
    data.mkdir()
    for number in range(8):
        rows = [json.dumps({"text": f"{number} {i}"}) for i in range(5)]
        (data / f"train-{number}.jsonl").write_text("\n".join(rows))
    prepare(tmp_path / "out", "--dataset", "hf", "--dataset-path", str(data))
    source = open_dataset("tokens", str(tmp_path / "out"))
    assert len(source.shards) == 3
    texts = [BytesTokenizer().decode(source[i].tolist()) for i in range(len(source))]
    assert texts == [f"{number} {i}" for number in range(8) for i in range(5)]


@pytest.mark.parametrize(
    ("documents", "wanted", "shards"),
    [(10, None, 10), (10**6, None, 64), (10**7, None, 100), (10**10, None, 1024), (10**5, 9, 9)],
)
def test_large_data_have_no_more_shards_than_a_process_can_map(
    documents: int, wanted: int | None, shards: int
) -> None:
    assert _count_parts(range(documents), documents, wanted) == shards


def test_after_a_kill_the_same_command_goes_on(tmp_path: Path) -> None:
    """Real processes, killed by SIGKILL in the middle of shards."""
    lines = tmp_path / "lines.jsonl"
    with lines.open("w") as file:
        for i in range(30_000):
            file.write(json.dumps({"text": f"text {i} " * 40}) + "\n")
    options = ["data", "prepare", "--dataset", "jsonl", "--dataset-path", str(lines)]
    options += ["--workers", "2", "--shards", "40"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", "torchtitan", *options, "--out", str(killed)]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE)
    while not list(killed.glob("shard-*.json")) and process.poll() is None:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()
    kept = {path.name: path.stat().st_mtime_ns for path in killed.glob("shard-*.bin")}
    done = [path.name for path in killed.glob("shard-*.json")]
    assert 0 < len(done) < 40 and not (killed / "index.json").exists()
    with pytest.raises(DataError, match="is unfinished: run the same"):
        open_dataset("tokens", str(killed))

    prepare(killed, *options[2:])
    prepare(whole, *options[2:])
    for path in whole.iterdir():
        assert (killed / path.name).read_bytes() == path.read_bytes()
    for name in done:  # was not written again
        name = name.replace(".json", ".bin")
        assert (killed / name).stat().st_mtime_ns == kept[name]
    assert {path.name for path in killed.iterdir()} == {path.name for path in whole.iterdir()}


def test_processes_end_with_the_one_that_began_and_hold_its_lock_till_then(tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text(json.dumps({"text": "words " * 50}) + "\n")
    lines.write_text(lines.read_text() * 100_000)
    options = ["--dataset", "jsonl", "--dataset-path", str(lines), "--shards", "1"]
    command = [sys.executable, "-m", "torchtitan", "data", "prepare", *options]
    out = tmp_path / "out"
    process = subprocess.Popen([*command, "--out", str(out)], stderr=subprocess.PIPE)

    def partial() -> list[Path]:
        return list(out.glob("shard-*.partial"))

    while not partial() and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.wait()
    process.stderr.close()
    with (out / "prepare.lock").open("wb") as lock:
        for _ in range(400):
            if try_lock(lock):  # the worker has ended, too, and has removed its file
                break
            time.sleep(0.05)
        assert try_lock(lock)
    assert not partial() and not (out / "shard-00000.json").exists()


def test_a_second_start_is_refused_while_the_first_lives(lines: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["prepare", "--dataset", "jsonl", "--dataset-path", str(lines), "--out", str(out)]
    out.mkdir()
    lock = (out / "prepare.lock").open("wb")
    assert try_lock(lock)
    (out / "prepare.json.of-the-first.partial").touch()
    with pytest.raises(ConfigError, match="another `torchtitan data prepare` is writing it"):
        main_of_data(words)
    assert list(out.glob("*.partial"))
    threading.Timer(0.3, lock.close).start()  # as when the first is killed
    assert main_of_data(words) == 0
    assert not list(out.glob("*.partial")) and not (out / "prepare.lock").exists()


def test_who_waits_for_a_process_that_fails_then_locks_out_others(tmp_path: Path) -> None:
    with pytest.raises(DataError), _lock(tmp_path):
        waiting = (tmp_path / "prepare.lock").open("wb")  # as that of a process that waits
        assert not try_lock(waiting)
        raise DataError("a document is malformed")
    with waiting:
        assert try_lock(waiting)
        with pytest.raises(ConfigError, match="another `torchtitan data prepare`"):
            _lock(tmp_path).__enter__()


def test_without_locks_both_write_the_same(
    lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    path, array = tmp_path / "shard.bin", np.arange(100)
    with FileWriter(path) as first:
        first.write(array[:50].tobytes())
        with FileWriter(path) as second:
            second.write(array.tobytes())
        with pytest.raises(KeyboardInterrupt), FileWriter(path):
            raise KeyboardInterrupt
        first.write(array[50:].tobytes())
    assert path.read_bytes() == array.tobytes() and first.sha256 == second.sha256

    out = tmp_path / "out"
    prepare(out, "--dataset", "jsonl", "--dataset-path", str(lines), "--shards", "3")
    settings = json.loads((out / "prepare.json").read_text())
    index = json.loads((out / "index.json").read_text())
    assert _write_index(out, settings, "<u2", 3) == index  # the other one came first


def test_a_process_that_fails_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object) -> None:
        raise ZeroDivisionError("of a bug")

    def die(*args: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    options = ["--dataset", "jsonl", "--dataset-path", str(tmp_path / "lines.jsonl")]
    (tmp_path / "lines.jsonl").write_text('{"text": "a"}\n')
    for function, message in (
        (fail, r"failed: ZeroDivisionError"),
        (die, r"killed by SIGKILL \(out of mem"),
    ):
        monkeypatch.setattr("torchtitan.data.prepare_work._write_shard", function)
        with pytest.raises(DataError, match=message):
            main_of_data(["prepare", "--out", str(tmp_path / "out"), *options])
    assert "in fail" in capfd.readouterr().err  # the traceback


@pytest.mark.parametrize("sizes", [[100], [100, 2**20]], ids=["at the end", "within"])
def test_a_file_that_the_disk_refuses_leaves_nothing(tmp_path: Path, sizes: list[int]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, hard))
    try:
        with (
            pytest.raises(ConfigError, match=r"^--out: cannot write .*shard.bin: File too large$"),
            FileWriter(tmp_path / "shard.bin") as file,
        ):
            for size in sizes:
                file.write(b"x" * size)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_it_says_that_it_goes_on_after_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("torchtitan.data.command.prepare", interrupt)
    assert main_of_data(["prepare", "--out", str(tmp_path / "out")]) == 130
    assert "run the same command again" in capsys.readouterr().err


def test_as_many_processes_as_cores_it_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {3, 5, 7}, raising=False)
    monkeypatch.setattr(
        "torchtitan.data.command.prepare",
        lambda options, show: (
            seen.append(options.workers)
            or {"documents": 0, "tokens": 0} | {"shards": [], "skipped": 0}
        ),
    )
    main_of_data(["prepare", "--out", str(tmp_path / "out")])
    assert seen == [3]


def test_another_preparation_is_not_mixed_in(lines: Path, tmp_path: Path) -> None:
    options = ["--dataset", "jsonl", "--dataset-path", str(lines)]
    prepare(tmp_path / "out", *options)
    prepare(tmp_path / "out", *options)  # is complete
    with pytest.raises(SystemExit) as stopped:
        prepare(tmp_path / "out", *options, "--shards", "3")
    assert stopped.value.code == 2
    lines.write_text(json.dumps({"text": "other"}) + "\n")
    with pytest.raises(SystemExit):
        prepare(tmp_path / "out", *options)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.doc").touch()
    with pytest.raises(SystemExit):
        prepare(tmp_path / "full", *options)


def write_source(kind: str, folder: Path, texts: list[str]) -> None:
    """Data of a kind that `datasets` reads, whose file has a new time each time."""
    folder.mkdir(exist_ok=True)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    if kind == "parquet":
        pq.write_table(pa.table({"text": texts}), folder / "a.parquet")
    elif kind == "saved":
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(folder)
    elif kind == "jsonl":
        (folder / "a.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    else:
        (folder / "train-0.jsonl").write_text(rows)
        (folder / "README.md").touch()


@pytest.mark.parametrize("kind", ["parquet", "saved", "jsonl", "hf"])
def test_changed_sources_of_datasets_are_seen(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub")
    write_source(kind, tmp_path / "data", ["old"] * 5)
    out = tmp_path / "out"
    dataset = "arrow" if kind == "saved" else kind
    options = ["--dataset", dataset, "--dataset-path", str(tmp_path / "data"), "--workers", "1"]
    prepare(out, *options)
    prepare(out, *options)  # is complete
    write_source(kind, tmp_path / "data", ["new"] * 5)
    with pytest.raises(SystemExit):
        prepare(out, *options)
    assert "was started with a different source" in capsys.readouterr().err


@pytest.mark.parametrize("bad", ['{"text": ', '{"text": "a", "b": ' + "[" * 100_000])
def test_a_malformed_document_stops_or_is_counted(tmp_path: Path, capsys, bad: str) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text(f'{{"text": "a"}}\n{bad}\n{{"text": "b"}}\n')
    options = ["--dataset", "jsonl", "--dataset-path", str(lines)]
    with pytest.raises(SystemExit):
        prepare(tmp_path / "stop", *options)
    assert "lines.jsonl:2: not valid JSON" in capsys.readouterr().err
    prepare(tmp_path / "skip", *options, "--on-error", "skip")
    assert "2 documents, 4 tokens, 3 shards, 1 documents skipped" in capsys.readouterr().out


def change(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_conversations_are_not_prepared(tmp_path: Path, capsys) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": [{"role": "assistant", "content": "Hello"}]}')
    with pytest.raises(SystemExit):
        prepare(tmp_path / "out", "--dataset", "jsonl", "--dataset-path", str(tmp_path / "a.jsonl"))
    assert "a conversation, and only training tokenizes those" in capsys.readouterr().err


def test_a_changed_shard_is_named(lines: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(out, "--dataset", "jsonl", "--dataset-path", str(lines), "--shards", "3")
    change(out / "shard-00001.bin")
    source = PreparedTokens(out)
    source.verify(0, 3)  # the first shard
    with pytest.raises(DataError, match=r"shard-00001\.bin has changed since it was prepared"):
        source.verify(1, 3)
    with (out / "shard-00002.idx").open("ab") as file:
        file.write(b"more")
    with pytest.raises(DataError, match=r"shard-00002\.idx has changed .* bytes instead of"):
        PreparedTokens(out)
    (out / "shard-00000.bin").unlink()
    with pytest.raises(DataError, match=r"shard-00000\.bin cannot be read"):
        PreparedTokens(out)
    (out / "index.json").write_text("{")
    with pytest.raises(DataError, match=r"index\.json is damaged"):
        PreparedTokens(out)


def test_each_field_of_the_index_that_is_damaged_is_told(lines: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(out, "--dataset", "jsonl", "--dataset-path", str(lines), "--shards", "2")
    whole = json.loads((out / "index.json").read_text())
    needed = {"name", "tokens", "documents", "bin_sha256", "idx_sha256"}
    places = [(["shards", number], key) for number in (0, 1) for key in needed]
    places += [(["tokenizer"], key) for key in ("path", "fingerprint", "vocab_size", "eos_id")]
    places += [([], key) for key in ("dtype", "shards", "tokenizer", "source", "skipped")]
    for place, key in places:
        for value in (None, [], "gone"):
            index = table = json.loads(json.dumps(whole))
            for step in place:
                table = table[step]
            if value == "gone":
                del table[key]
            else:
                table[key] = value
            (out / "index.json").write_text(json.dumps(index))
            with pytest.raises(DataError, match=r"index\.json is damaged"):
                PreparedTokens(out)
    for text in ("[" * 100_000, json.dumps(whole | {"dtype": "x"})):
        (out / "index.json").write_text(text)
        with pytest.raises(DataError, match=r"index\.json is damaged"):
            PreparedTokens(out)


def test_inspect_tells_of_damaged_tokens_and_ends(lines: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    prepare(out, "--dataset", "jsonl", "--dataset-path", str(lines), "--shards", "1")
    file, ends = out / "shard-00000.bin", out / "shard-00000.idx"
    for path, damage, message in (
        (file, b"\x00\x70", "token 28672 is outside the tokenizer's vocabulary of 258"),
        (ends, b"\x00\x00\x00\x00\x00\x00\x00\x70", f"{file} is damaged: document "),
    ):
        content = path.read_bytes()
        path.write_bytes(content[: -len(damage)] + damage)
        with pytest.raises(SystemExit) as caught:
            main(["data", "inspect", str(out)])
        assert caught.value.code == 2
        shown = capsys.readouterr().err
        assert message in shown.splitlines()[-1] and "Traceback" not in shown
        path.write_bytes(content)


@pytest.mark.parametrize("content", ["[", "[]", "[" * 100_000])
def test_damaged_settings_are_told(content: str, lines: Path, tmp_path: Path) -> None:
    (tmp_path / "prepare.json").write_text(content)
    with pytest.raises(ConfigError, match=r"prepare\.json is damaged; remove"):
        main_of_data(
            ["prepare", "--dataset", "jsonl", "--dataset-path", str(lines)]
            + ["--out", str(tmp_path)]
        )


def test_tokens_of_another_tokenizer_are_refused(lines: Path, tmp_path: Path, bpe: Path) -> None:
    prepare(tmp_path / "out", "--dataset", "jsonl", "--dataset-path", str(lines))
    with pytest.raises(DataError, match="was prepared with the tokenizer 'bytes'"):
        open_dataset("tokens", str(tmp_path / "out")).use_tokenizer(HuggingFaceTokenizer(bpe))


def test_inspect_shows_statistics_and_samples(lines: Path, tmp_path: Path, capsys) -> None:
    prepare(tmp_path / "out", "--dataset", "jsonl", "--dataset-path", str(lines))
    capsys.readouterr()
    assert main(["data", "inspect", str(tmp_path / "out"), "--samples", "2", "--verify"]) == 0
    shown = capsys.readouterr().out
    count = sum(1 for text in TEXTS if text)
    assert f"documents      {count:,}" in shown and "of uint16" in shown
    assert shown.count("\n--- document ") == 2 and "document 1" in shown
    assert main(["data", "inspect", str(lines), "--dataset", "jsonl"]) == 0
    assert "documents      300" in capsys.readouterr().out


def test_inspect_marks_what_is_not_trained_on(tmp_path: Path, capsys) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": chat}) + "\n")
    assert main(["data", "inspect", str(path), "--dataset", "jsonl", "--text-key", "messages"]) == 0
    shown = capsys.readouterr().out
    assert "[[<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n]]Hello<|im_end|>\n" in shown

    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}({{ m.role }}) {{ m.content }}{% endfor %}")
    words = ["data", "inspect", str(path), "--dataset", "jsonl", "--text-key", "messages"]
    assert main([*words, "--chat-template", str(template)]) == 0
    assert "(user) Hi" in capsys.readouterr().out


def test_inspect_tells_if_all_documents_are_malformed(tmp_path: Path, capsys) -> None:
    (tmp_path / "lines.jsonl").write_text("no JSON\n\nnone\n")
    with pytest.raises(SystemExit):
        main(["data", "inspect", str(tmp_path / "lines.jsonl"), "--dataset", "jsonl"])
    assert "lines.jsonl: all its documents, 2, are malformed" in capsys.readouterr().err


def test_inspect_shows_special_tokens_of_a_chat(tmp_path: Path, capsys) -> None:
    words = {"</s>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "user": 3, "assistant": 4, "Hi": 5}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>", "<|im_start|>", "<|im_end|>"])
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi"}]
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": chat}) + "\n")

    options = ["--dataset", "jsonl", "--text-key", "messages", "--tokenizer-path", str(folder)]
    assert main(["data", "inspect", str(path), *options]) == 0
    shown = capsys.readouterr().out
    assert "[[<|im_start|> user Hi <|im_end|> <|im_start|> assistant]]Hi <|im_end|>" in shown
    assert "'<|im_start|>' " in shown.partition("most frequent")[2]


@pytest.mark.parametrize("told", ["by the option", "by an entry point"])
def test_datasets_are_registered_as_for_training(
    tmp_path: Path, monkeypatch, capsys, told: str
) -> None:
    name = told.replace(" ", "_")
    (tmp_path / f"data_{name}.py").write_text(
        "from torchtitan.data import register_dataset\n"
        f"register_dataset({name!r}, lambda path, text_key: ['one', 'two words'])\n"
    )
    options = ["--custom-import", f"data_{name}"]
    if told == "by an entry point":
        options, info = [], tmp_path / "fake_data-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-data\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[torchtitan.models]\nx = data_{name}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sources, "DATASETS", dict(sources.DATASETS))
    assert main(["data", "inspect", "--dataset", name, *options]) == 0
    assert "documents      2" in capsys.readouterr().out
    out = str(tmp_path / "out")
    assert main(["data", "prepare", "--dataset", name, "--out", out, *options]) == 0
    assert "2 documents" in capsys.readouterr().out
