from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from torchtitan.components.tokenizer import (
    BytesTokenizer,
    HuggingFaceTokenizer,
    build_tokenizer,
    check_tokenizer,
)
from torchtitan.config import JobConfig, load_config
from torchtitan.errors import BadDocumentError, ConfigError, DataError
from torchtitan.preflight.model_fit import fitting_model

OWN_PARTS = "--job.custom_import=own_parts_llama"
VOCABULARY = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "<unk>": 9}  # ids have gaps


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = tokenizers.Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config.json", {"eos_token": "</s>", "bos_token": "<s>"})
    return tmp_path


def write(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("text", ["", "plain", "é漢😀", "a\0b\r\n"])
def test_bytes_lose_nothing(text: str) -> None:
    tokenizer = BytesTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text
    assert max([*ids, tokenizer.eos_id]) < tokenizer.vocab_size


def test_bytes_of_half_a_character_are_shown_as_such() -> None:
    assert BytesTokenizer().decode("é".encode()[:1]) == "\ufffd"


def test_a_folder_is_loaded_whole_and_for_training(folder: Path) -> None:
    tokenizer = HuggingFaceTokenizer(folder)
    assert tokenizer.encode("a b c a b") == [2, 3, 9, 2, 3]  # not cut off, nor filled up
    assert tokenizer.encode("") == []
    assert tokenizer.decode([0, 2, 3, 1]) == "a b"
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 10)


def test_the_config_chooses_the_tokenizer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = JobConfig()
    config.model.tokenizer_path = "bytes"
    assert isinstance(build_tokenizer(config), BytesTokenizer)
    monkeypatch.setenv("HOME", str(folder.parent))
    config.model.tokenizer_path = f"~/{folder.name}"
    assert build_tokenizer(config).vocab_size == 10


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"eos_token": {"content": "</s>", "special": True}}),
        ("special_tokens_map.json", {"eos_token": "</s>"}),
        ("generation_config.json", {"eos_token_id": 1}),
        ("config.json", {"eos_token_id": [1, 2]}),
    ],
)
def test_eos_may_be_said_in_several_places(folder: Path, name: str, content: dict) -> None:
    (folder / "tokenizer_config.json").unlink()
    write(folder, name, content)
    tokenizer = HuggingFaceTokenizer(folder)
    assert (tokenizer.eos_id, tokenizer.bos_id) == (1, None)


def test_the_first_place_counts(folder: Path) -> None:
    write(folder, "config.json", {"eos_token_id": 3})
    assert HuggingFaceTokenizer(folder).eos_id == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", {}, "does not define which token ends a document"),
        ("tokenizer_config.json", {"eos_token": "<end>"}, "'<end>' is not in the vocabulary"),
        ("tokenizer_config.json", ["</s>"], "holds no JSON object"),
        ("config.json", {"eos_token_id": 10}, r"eos_token_id = 10 is not an id.*0 to 9"),
        ("config.json", {"eos_token_id": -1}, "eos_token_id = -1"),
        ("config.json", {"eos_token_id": "1"}, "eos_token_id = '1'"),
        ("config.json", {"eos_token_id": True}, "eos_token_id = True"),
        ("config.json", {"eos_token_id": []}, "does not define"),
    ],
)
def test_an_unusable_eos_is_named(folder: Path, name: str, content: object, message: str) -> None:
    (folder / "tokenizer_config.json").unlink()
    write(folder, name, content)
    with pytest.raises(DataError, match=message) as error:
        HuggingFaceTokenizer(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": 1}', b"\xff"])
def test_a_corrupt_tokenizer_is_named(folder: Path, content: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.json is not a valid tokenizer"):
        HuggingFaceTokenizer(folder)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 99_999])
def test_a_corrupt_file_beside_it_is_named(folder: Path, content: bytes) -> None:
    (folder / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer_config\.json is damaged"):
        HuggingFaceTokenizer(folder)


def test_a_missing_folder_or_file_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere' is not a folder.*'bytes'"):
        HuggingFaceTokenizer(folder / "nowhere")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"has no tokenizer\.json"):
        HuggingFaceTokenizer(folder)


def test_whether_a_folder_begins_texts_with_bos(folder: Path) -> None:
    assert not HuggingFaceTokenizer(folder).adds_bos
    assert not hasattr(BytesTokenizer(), "adds_bos")
    named = {"eos_token": "</s>", "bos_token": "<s>"}
    write(folder, "tokenizer_config.json", named | {"add_bos_token": True})
    assert HuggingFaceTokenizer(folder).adds_bos
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    for setting, adds in ((None, True), (False, False)):
        write(folder, "tokenizer_config.json", named | {"add_bos_token": setting})
        assert HuggingFaceTokenizer(folder).adds_bos is adds
    write(folder, "tokenizer_config.json", {"eos_token": "</s>"})
    assert not HuggingFaceTokenizer(folder).adds_bos


def test_special_tokens_beyond_a_models_vocabulary_are_refused_in_texts(tmp_path: Path) -> None:
    """As of Gemma 3 1B, whose tokenizer has one more, for models that see images."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"</s>": 0, "a": 1, "b": 2}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["</s>", "<image>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config.json", {"eos_token": "</s>"})
    tokenizer = HuggingFaceTokenizer(tmp_path)
    assert tokenizer.vocab_size == 4 and tokenizer.encode("a<image>") == [1, 3]
    assert tokenizer.leave_out(2) is None  # "b" is no special token
    assert tokenizer.encode("b<image>") == [2, 3]
    assert tokenizer.leave_out(3) == ["<image>"]
    assert tokenizer.encode("ab") and tokenizer.encode_batch(["a b"]) == [[1, 2]]
    for encode in (
        tokenizer.encode,
        tokenizer.encode_prompt,
        lambda t: tokenizer.encode_batch([t]),
    ):
        with pytest.raises(BadDocumentError, match=r"'<image>' \(3\), .* vocabulary is 3"):
            encode("a<image>")
    write(tmp_path, "tokenizer_config.json", {"eos_token": "<image>"})
    assert HuggingFaceTokenizer(tmp_path).leave_out(3) is None  # which is needed


def test_a_path_must_be_that_of_a_tokenizer_where_the_tokenizer_is_ours(tmp_path: Path) -> None:
    config = JobConfig()
    config.model.tokenizer_path = str(tmp_path)
    message = f'model.tokenizer_path = "{tmp_path}": not a folder with a Hugging Face tokenizer.'
    with pytest.raises(ConfigError, match=message):
        build_tokenizer(config)


def test_a_path_is_what_the_author_of_a_tokenizer_says(tmp_path: Path) -> None:
    file = tmp_path / "letters.txt"
    file.write_text("abc")
    path = f"--model.tokenizer_path={file}"
    config = load_config(["--model.name=own_tokenizer", "--model.flavor=tiny", OWN_PARTS, path])
    assert fitting_model(config, 1).tokenizer.encode("cab") == [4, 2, 3]


def test_a_tokenizer_that_lacks_something_is_refused() -> None:
    check_tokenizer(None, JobConfig())  # the model reads no text
    check_tokenizer(BytesTokenizer(), JobConfig())
    message = r"^build_tokenizer_fn of llama3 returns object, which has no vocab_size, bos_id, "
    with pytest.raises(ConfigError, match=message):
        check_tokenizer(object(), JobConfig())
