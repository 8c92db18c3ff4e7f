"""`data.add_bos`: documents that begin with the tokenizer's bos."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from torchtitan.cli import main
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.tokenizer import BytesTokenizer
from torchtitan.config import JobConfig
from torchtitan.data import build_dataloader, build_validation_dataloader, sources
from torchtitan.data.chat import CHATML, ChatTemplate
from torchtitan.data.command import main as main_of_data
from torchtitan.data.encode import Encoder
from torchtitan.data.sources import open_dataset
from torchtitan.errors import DataError

BOS, EOS = BytesTokenizer.bos_id, BytesTokenizer.eos_id
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


class Characters:
    """`<` is the bos token, as in texts and templates that write it."""

    vocab_size, bos_id, eos_id = 128, ord("<"), 0

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text if character != " "]


class WithoutBos(Characters):
    bos_id = None


def test_a_text_has_one_bos_and_an_empty_one_has_none() -> None:
    assert Encoder(BytesTokenizer(), add_bos=True)("ab").tolist() == [BOS, 97, 98, EOS]
    assert Encoder(BytesTokenizer(), add_bos=True)("").size == 0
    encoder = Encoder(Characters(), add_bos=True)
    assert encoder("ab").tolist() == encoder("<ab").tolist() == [ord("<"), 97, 98, 0]
    assert encoder(" ").tolist() == [ord("<"), 0]  # a text that has no tokens
    assert encoder("ab").dtype == np.int32


@pytest.mark.parametrize("bos", ["", "{{ bos_token }}"])
def test_a_conversation_has_one_bos_that_is_not_learned(bos: str) -> None:
    template = ChatTemplate(bos + CHATML.replace("<|", "|"), {"bos_token": "<"}, "the template")
    ids = Encoder(Characters(), lambda: template, add_bos=True)(CHAT).tolist()
    assert ids[0] == ~ord("<") and ids.count(~ord("<")) == 1 and ord("<") not in ids
    assert ids[1] == ~ord("|")


def test_where_the_assistant_begins_bos_is_not_learned_either() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{{ m.content }}{% endfor %}", {}, "the template"
    )
    encode = Encoder(Characters(), lambda: template, add_bos=True)
    assert encode(CHAT[1:]).tolist() == [~ord("<"), ord("a"), ~0]


def config_of(path: Path, dataset: str = "text", mask: bool = False) -> JobConfig:
    config = JobConfig()
    config.data.add_bos, config.training.document_mask = True, mask
    for section in (config.training, config.validation):
        section.dataset, section.dataset_path = dataset, str(path)
        section.local_batch_size, section.seq_len = 2, 32
    return config


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("packing", ["contiguous", "best_fit"])
def test_training_and_validation_begin_documents_with_it(
    tmp_path: Path, packing: str, mask: bool
) -> None:
    """It follows each eos, from which it is predicted unless documents are kept apart."""
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text("x" * (number % 5 + 1))
    config = config_of(tmp_path, mask=mask)
    config.data.packing = packing
    for build in (build_dataloader, build_validation_dataloader):
        loader = build(config, BytesTokenizer(), 0, 1)
        batch = next(loader)
        loader.close()
        assert (batch["tokens"][:, 0] == BOS).all()
        begins = batch["tokens"] == BOS
        assert begins.sum() > 6
        assert (batch["positions"][begins] == 0).all()
        labels = batch["labels"][:, :-1][begins[:, 1:]]
        assert (labels == (IGNORE_INDEX if mask else BOS)).all()


def test_a_tokenizer_without_bos_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"^data\.add_bos = true: the tokenizer has no bos token"):
        build_dataloader(config_of(tmp_path), WithoutBos(), 0, 1)


def lines(path: Path) -> list[str]:
    file = path / "lines.jsonl"
    file.write_text("".join(json.dumps({"text": "x" * n}) + "\n" for n in range(9)))
    return ["data", "prepare", "--dataset", "jsonl", "--dataset-path", str(file), "--out"]


def test_documents_of_ids_must_begin_with_it(tmp_path: Path, monkeypatch) -> None:
    documents = [[], [BOS, 5, EOS], [7, EOS]]
    monkeypatch.setitem(
        sources.DATASETS, "ids", lambda path, text_key: list(map(np.array, documents))
    )
    config = config_of(tmp_path, "ids")
    build_dataloader(config, BytesTokenizer(), 0, 1).close()
    command = ["prepare", "--dataset", "ids", "--add-bos", "--workers=1", "--shards=1", "--out"]
    with pytest.raises(DataError, match=r"token ids .* begins with 7 instead of bos \(256\)"):
        main_of_data([*command, str(tmp_path / "out")])
    documents[1] = [5, EOS]
    with pytest.raises(DataError, match=r"token ids .* begins with 5 instead of bos \(256\)"):
        build_dataloader(config, BytesTokenizer(), 0, 1)


def test_another_bos_than_that_of_the_prepared_tokens_is_refused(tmp_path: Path) -> None:
    assert main([*lines(tmp_path), str(tmp_path / "out"), "--add-bos"]) == 0
    source = open_dataset("tokens", str(tmp_path / "out"))
    source.require_bos(BOS)
    with pytest.raises(DataError, match=rf"prepared with the bos {BOS}, but .* is now 5"):
        source.require_bos(5)


def test_prepared_documents_begin_with_it(tmp_path: Path, capsys, caplog) -> None:
    with_bos, without = tmp_path / "with", tmp_path / "without"
    assert main([*lines(tmp_path), str(with_bos), "--add-bos"]) == 0
    source = open_dataset("tokens", str(with_bos))
    documents = [source[i].tolist() for i in range(len(source))]
    assert documents == [[BOS, *b"x" * n, EOS] for n in range(1, 9)]
    assert json.loads((with_bos / "index.json").read_text())["add_bos"] is True
    build_dataloader(config_of(with_bos, "tokens"), BytesTokenizer(), 0, 1).close()
    assert main(["data", "inspect", str(with_bos)]) == 0
    assert "bos            begins each document" in capsys.readouterr().out
    assert "--add-bos" not in caplog.text
    config = config_of(with_bos, "tokens")
    config.data.add_bos = False
    build_dataloader(config, BytesTokenizer(), 0, 1).close()
    assert "with was prepared with --add-bos: set data.add_bos = true" in caplog.text

    assert main([*lines(tmp_path), str(without)]) == 0
    config = config_of(without, "tokens")
    problem = r"^training\.dataset = 'tokens': add_bos is set, but .*without was prepared without"
    with pytest.raises(DataError, match=problem):
        build_dataloader(config, BytesTokenizer(), 0, 1)
    with pytest.raises(SystemExit):  # which would take the documents as they are
        options = ["--dataset", "tokens", "--dataset-path", str(without), "--add-bos"]
        main(["data", "prepare", *options, "--out", str(tmp_path / "again")])
    assert not (tmp_path / "again").exists()


def test_texts_that_are_tokenized_many_at_a_time_begin_with_it_too(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "x": 2}, unk_token="x")).save(
        str(folder / "tokenizer.json")
    )
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    options = ["--tokenizer-path", str(folder), "--add-bos"]
    assert main([*lines(tmp_path), str(tmp_path / "out"), *options]) == 0
    source = open_dataset("tokens", str(tmp_path / "out"))
    assert [source[i].tolist() for i in range(len(source))] == [[0, 2, 1]] * 8
    del names["bos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    with pytest.raises(DataError, match=r"^--add-bos: the tokenizer has no bos token"):
        main_of_data([*lines(tmp_path)[1:], str(tmp_path / "other"), *options])
    assert not (tmp_path / "other").exists()


def test_a_folder_begun_without_it_is_not_gone_on_with(tmp_path: Path, capsys) -> None:
    command = [*lines(tmp_path), str(tmp_path / "out")]
    assert main(command) == 0
    with pytest.raises(SystemExit):
        main([*command, "--add-bos"])
    assert "was started with a different add_bos (False; now True)" in capsys.readouterr().err


@pytest.mark.parametrize("first", [BOS, 5])
def test_other_token_files_must_begin_with_it(tmp_path: Path, first: int) -> None:
    np.array([first, 7, EOS, BOS, 8, EOS], np.uint16).tofile(tmp_path / "a.bin")
    config = config_of(tmp_path / "a.bin", "tokens")
    if first == BOS:
        loader = build_dataloader(config, BytesTokenizer(), 0, 1)
        assert BOS in next(loader)["tokens"]
        loader.close()
        return
    with pytest.raises(
        DataError, match=r"a\.bin: add_bos is set, .* do not begin with bos \(256\)"
    ):
        build_dataloader(config, BytesTokenizer(), 0, 1)
