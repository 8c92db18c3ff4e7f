"""Own data, mixtures and prepared tokens in whole runs, and mistakes in the data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from harness import Finished, command, read_lines, train
from test_bad_input import assert_one_message
from tiny_llama import OPTIONS
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from torchtitan.cli import main

SAVING = ["--checkpoint.enable", "--checkpoint.interval=3"]
MIXTURE = """
[training]
document_mask = true
[data]
packing = "best_fit"
workers = 2
on_error = "skip"
[[data.sources]]
name = "prepared"
dataset = "tokens"
dataset_path = "{folder}/tokens"
weight = 3
[[data.sources]]
name = "lines"
dataset = "jsonl"
dataset_path = "{folder}/lines.jsonl"
text_key = "content"
weight = 1
[[data.sources]]
name = "chat"
dataset = "jsonl"
dataset_path = "{folder}/chat.jsonl"
text_key = "messages"
weight = 0
[[data.phases]]
from_step = 4
weights = [0, 1, 1]
"""


def prepare(text: Path, out: Path) -> None:
    """In this process, since the harness's may have no children."""
    assert main(["data", "prepare", "--dataset-path", str(text), "--out", str(out)]) == 0


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("mixture")
    (folder / "words.txt").write_text("".join(f"{i} words\n" * (i % 5) for i in range(400)))
    prepare(folder / "words.txt", folder / "tokens")
    lines = [json.dumps({"content": f"line {i} " * (i % 7)}) for i in range(100)]
    lines[::10] = ["{broken"] * 10
    (folder / "lines.jsonl").write_text("\n".join(lines))
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (folder / "chat.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    config = folder / "mixture.toml"
    config.write_text(MIXTURE.format(folder=folder))
    return f"--job.config_file={config}"


def test_a_mixture_is_resumed_on_other_ranks_with_its_counts(mixture: str, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", *OPTIONS, mixture, *SAVING)
    counts = [
        [line[f"data_tokens/{name}"] for name in ("prepared", "lines", "chat")] for line in whole
    ]
    step = 8 * 32
    assert counts[2] == [step * 3 * 3 / 4, step * 3 / 4, 0]
    assert counts[5] == [step * 3 * 3 / 4, step * (3 / 4 + 1.5), step * 1.5]
    last = whole[-1]
    assert last["data_epoch/chat"] > 0 and last["data_epoch/prepared"] > 0
    assert 0 < last["data_padding_share"] < 0.5 and last["data_skipped_documents"] > 0

    other = tmp_path / "other"
    shutil.copytree(tmp_path / "whole", other)
    shutil.rmtree(other / "checkpoint" / "step-6")
    again = train(other, *OPTIONS, mixture, *SAVING, "--data.workers=1", ranks=2)
    assert [line["step"] for line in again] == [1, 2, 3, 4, 5, 6]
    for line, expected in zip(again[3:], whole[3:], strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        for key in ("data_tokens/lines", "data_tokens/chat"):
            assert line[key] == pytest.approx(expected[key])
        # A row that has not read of its pool since then does not know how large it is.
        assert 0 < line["data_epoch/lines"] <= expected["data_epoch/lines"] * (1 + 1e-6)

    done = command(
        *("train", *OPTIONS, mixture, *SAVING, "--data.packing=contiguous"),
        *("--training.steps=7", "--job.dump_folder", str(other)),
    )
    assert_one_message(done, "was saved with another data.packing")


def refused(folder: Path, *options: str, ranks: int = 1) -> Finished:
    return command(
        "train", *OPTIONS, "--job.dump_folder", str(folder / "run"), *options, ranks=ranks
    )


def lines_of(folder: Path, content: bytes) -> list[str]:
    path = folder / "lines.jsonl"
    path.write_bytes(content)
    return ["--training.dataset=jsonl", f"--training.dataset_path={path}"]


BAD_LINES = {
    "broken": (b'{"text": "a"}\n{"text": \n', "lines.jsonl:2: not valid JSON"),
    "key": (b'{"content": "a", "id": 1}\n', "no such field. Did you mean 'content'? Allowed: co"),
    "empty": (b"", "lines.jsonl': empty"),
    "not UTF-8": (b'{"text": "a"}\n{"text": "\xff"}\n', "lines.jsonl:2: not UTF-8 text"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_lines(case: str, tmp_path: Path) -> None:
    content, message = BAD_LINES[case]
    done = refused(tmp_path, *lines_of(tmp_path, content), ranks=2)
    assert_one_message(done, "training.dataset = 'jsonl'", message)


def test_bad_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    options = lines_of(tmp_path, b'{"text": "fine"}\n{"text": \n\n{"text": "good"}\n')
    lines = train(tmp_path / "run", *OPTIONS, *options, "--data.on_error=skip", ranks=2)
    assert lines[-1]["data_skipped_documents"] > 0
    options = lines_of(tmp_path, b'{"text": \n{"text": \n')
    assert_one_message(refused(tmp_path, *options, "--data.on_error=skip"), "no document with text")


def test_documents_longer_than_a_sequence_are_trained_on(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("a long text without an end " * 2000)
    options = ["--training.dataset=text", f"--training.dataset_path={tmp_path}/long.txt"]
    for packing in ("contiguous", "best_fit"):
        lines = train(tmp_path / packing, *OPTIONS, *options, f"--data.packing={packing}")
        assert lines[-1]["loss"] < lines[0]["loss"]


def test_tokens_that_do_not_fit(tmp_path: Path) -> None:
    """Another tokenizer's ids, a shard that has changed, an unfinished folder, no path."""
    (tmp_path / "words.txt").write_text("some words\n" * 100)
    out = tmp_path / "tokens"
    prepare(tmp_path / "words.txt", out)
    tokens = ["--training.dataset=tokens", f"--training.dataset_path={out}"]

    shard = out / "shard-00000.bin"
    content = shard.read_bytes()
    shard.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    done = refused(tmp_path, *tokens, "--data.verify_hashes", ranks=2)
    assert_one_message(done, "shard-00000.bin has changed since it was prepared", "content hash")
    shard.write_bytes(content[:-2])
    done = refused(tmp_path, *tokens, ranks=2)
    assert_one_message(done, "shard-00000.bin has changed", "bytes instead")
    shard.write_bytes(content)
    index = json.loads((out / "index.json").read_text())
    index["tokenizer"]["vocab_size"] = 50_257
    (out / "index.json").write_text(json.dumps(index))
    done = refused(tmp_path, *tokens)
    assert_one_message(done, "vocab_size 50257", "model.tokenizer_path is a different one")
    (out / "index.json").unlink()
    assert_one_message(refused(tmp_path, *tokens), "is unfinished: run the same")

    np.array([1, 2, 40_000, 257], np.uint16).tofile(tmp_path / "gpt2.bin")
    options = ["--training.dataset=tokens", f"--training.dataset_path={tmp_path}/gpt2.bin"]
    assert_one_message(
        refused(tmp_path, *options), "gpt2.bin, document 0", "token 40000 is outside"
    )
    assert_one_message(refused(tmp_path, options[0]), "needs training.dataset_path")


def test_a_tokenizer_with_more_ids_than_the_model(tmp_path: Path) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.train_from_iterator(["some words and others, worse"] * 9, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    done = refused(tmp_path, f"--model.tokenizer_path={tmp_path}", ranks=2)
    ids = tokenizer.get_vocab_size()
    assert_one_message(done, "model.tokenizer_path", f"has {ids} tokens, but", "has only 264")


def test_what_a_run_says_of_its_data(tmp_path: Path) -> None:
    train(tmp_path, *OPTIONS, "--training.steps=2")
    line = read_lines(tmp_path / "metrics.jsonl")[-1]
    assert line["data_epoch"] >= 0 and "data_padding_share" not in line


def test_a_run_goes_on_with_another_source_and_a_larger_batch(tmp_path: Path) -> None:
    """On one and on two ranks alike: each reads its rows of the position that both have."""
    table = ""
    for name in ("a", "b", "c"):
        lines = [json.dumps({"text": f"{name}{i} " * (i % 7 + 1)}) for i in range(200)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        table += f'[[data.sources]]\nname = "{name}"\ndataset = "jsonl"\n'
        table += f'dataset_path = "{tmp_path}/{name}.jsonl"\n'
        (tmp_path / f"{name}.toml").write_text(table)
    train(tmp_path / "one", *OPTIONS, f"{tmp_path}/b.toml", *SAVING, "--training.steps=3")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    changed = f"{tmp_path}/c.toml", "--training.steps=5", "--training.global_batch_size=16"
    one, two = (
        train(tmp_path / name, *OPTIONS, *SAVING, *changed, ranks=ranks)
        for name, ranks in (("one", 1), ("two", 2))
    )
    for line, other in zip(one, two, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert {key: line[key] for key in line if key.startswith("data_tokens/")} == pytest.approx(
            {key: other[key] for key in other if key.startswith("data_tokens/")}
        )
    before, after = one[2], one[4]
    read = [after[f"data_tokens/{name}"] - before.get(f"data_tokens/{name}", 0) for name in "abc"]
    assert sum(read) == 2 * 16 * 32 and max(read) - min(read) <= 32
