"""The files of an exported folder besides weights say what training taught the model."""

import json
import logging

import pytest
import tiny_llama
import torch
from harness import train
from tiny_models import TINY
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, GenerationConfig

from torchtitan import cli
from torchtitan.components.checkpoint.huggingface import (
    ExportAssets,
    check_same_model,
    export_config,
    write_assets,
)
from torchtitan.components.checkpoint.tokenizer_files import (
    chat_template_of,
    end_of_turn,
    write_bytes_tokenizer,
)
from torchtitan.components.tokenizer import BytesTokenizer, HuggingFaceTokenizer
from torchtitan.config import JobConfig
from torchtitan.data import build_dataloader
from torchtitan.data.chat import CHATML
from torchtitan.errors import CheckpointError
from torchtitan.generation.load import ModelOptions, open_source

ARGS = TINY["llama3"]
EOS = 257
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def write(folder, *like, **assets):
    folder.mkdir()
    write_assets(folder, ARGS, torch.float32, ExportAssets("bytes", 128, like, **assets))
    return {
        name: json.loads((folder / name).read_text()).get("eos_token_id")
        for name in ("config.json", "generation_config.json")
        if (folder / name).is_file()
    }


@pytest.mark.parametrize(
    ("told", "expected"),
    [(5, [EOS, 5]), ([5, 6], [EOS, 5, 6]), (EOS, EOS), ([5, EOS], [5, EOS]), (None, None)],
)
def test_kept_files_name_the_end_of_texts_that_was_trained(told, expected, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    config = export_config(ARGS) | {"max_position_embeddings": 512, "eos_token_id": told}
    (base / "config.json").write_text(json.dumps(config))
    generation = json.dumps({"eos_token_id": told, "temperature": 0.5})
    (base / "generation_config.json").write_text(generation)
    found = write(tmp_path / "out", base)
    assert found == {"config.json": expected, "generation_config.json": expected}
    if told == expected:
        assert (tmp_path / "out" / "generation_config.json").read_text() == generation
    theirs = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (theirs.eos_token_id, theirs.temperature) == (expected, 0.5)


@pytest.mark.parametrize(("told", "expected"), [(100, 128), (512, 512)])
def test_kept_files_tell_of_the_longer_context_and_of_no_layer_that_is_left_out(
    told, expected, tmp_path
):
    args = TINY["deepseek_v3"]
    config = export_config(args) | {"max_position_embeddings": told, "num_nextn_predict_layers": 1}
    for name in ("base", "out", "alone"):
        (tmp_path / name).mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"bos_token_id": 7}))
    found = []
    for name, like in ("out", (tmp_path / "base",)), ("alone", ()):
        write_assets(tmp_path / name, args, torch.float32, ExportAssets("bytes", 128, like))
        found.append(json.loads((tmp_path / name / "config.json").read_text()))
    kept, ours = found
    assert (kept["max_position_embeddings"], kept["num_nextn_predict_layers"]) == (expected, 0)
    assert (kept["bos_token_id"], ours["bos_token_id"]) == (7, 256)
    assert ours["max_position_embeddings"] == 4 * 64  # as far as its rotations are stretched


class Own:
    """Args with a longest sequence, as of a table of positions."""

    @classmethod
    def from_hf_config(cls, config):
        own = cls()
        own.max_seq_len, own.n_layers = config["max_position_embeddings"], config["n_layers"]
        return own

    def to_hf_config(self):
        config = {"model_type": "own", "architectures": ["Own"], "n_layers": self.n_layers}
        return config | {"max_position_embeddings": self.max_seq_len}


def test_args_of_ones_own_beside_the_files_of_another_model(tmp_path):
    own = Own.from_hf_config({"max_position_embeddings": 512, "n_layers": 2})
    for name in ("other", "out"):
        (tmp_path / name).mkdir()
    config = export_config(ARGS) | {"max_position_embeddings": 64}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    assets = ExportAssets("bytes", 128, (tmp_path / "other",))
    write_assets(tmp_path / "out", own, torch.float32, assets)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["model_type"], written["max_position_embeddings"]) == ("own", 512)
    message = "other: config.json: Own.from_hf_config cannot read it: KeyError: 'n_layers'"
    with pytest.raises(CheckpointError, match=message):
        check_same_model(tmp_path / "other", own)


def test_a_config_out_of_range_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(export_config(ARGS) | {"num_key_value_heads": 0})
    )
    with pytest.raises(
        CheckpointError, match=r"config\.json: num_key_value_heads = 0 must be >= 1"
    ):
        check_same_model(tmp_path, ARGS)


def test_the_chat_template_that_the_tokenizer_does_not_have(tmp_path):
    template = tmp_path / "own.jinja"
    template.write_text("{{ messages[0]['content'] }}é", encoding="utf-8")
    for name in ("plain", "in_json", "in_file"):
        (tmp_path / name).mkdir()
        write_bytes_tokenizer(tmp_path / name)
    (tmp_path / "in_json" / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    (tmp_path / "in_file" / "chat_template.jinja").write_text("x")

    assert chat_template_of(None, "bytes") == CHATML
    assert chat_template_of(None, str(tmp_path / "plain")) == CHATML
    for name in ("in_json", "in_file"):
        assert chat_template_of(None, str(tmp_path / name)) == ""
        assert chat_template_of(str(template), str(tmp_path / name)) == template.read_text("utf-8")

    write(tmp_path / "out", chat_template=chat_template_of(str(template), "bytes"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "Hié"


def export_a_run(folder, document, *options):
    """A run of a step on four such documents leaves `run/checkpoint/step-1` and `step-1-hf`."""
    (folder / "data.jsonl").write_text(f"{json.dumps({'text': document})}\n" * 4)
    train(
        folder / "run",
        *tiny_llama.OPTIONS,
        "--training.steps=1",
        "--training.dataset=jsonl",
        f"--training.dataset_path={folder / 'data.jsonl'}",
        "--checkpoint.enable",
        "--checkpoint.last_save_in_hf",
        *options,
    )


@pytest.mark.parametrize("documents", ["text", "conversations"])
def test_a_run_on_conversations_exports_their_template(documents, tmp_path):
    document = "Hi there, you all. " * 9 if documents == "text" else CHAT * 9
    export_a_run(tmp_path, document, f"--data.add_bos={json.dumps(documents == 'text')}")
    folder = tmp_path / "run" / "checkpoint" / "step-1-hf"
    template = folder / "chat_template.jinja"
    assert template.is_file() == (documents == "conversations")
    if template.is_file():
        text = AutoTokenizer.from_pretrained(folder).apply_chat_template(CHAT, tokenize=False)
        assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    else:  # and prompts begin as the documents did, also where it is converted afterwards
        convert = ["convert", "to-hf", str(folder.with_name("step-1")), str(tmp_path / "converted")]
        assert cli.main(convert) == 0
        for exported in (folder, tmp_path / "converted"):
            assert AutoTokenizer.from_pretrained(exported)("ab").input_ids == [256, 97, 98]


def test_the_bytes_tokenizer_with_bos(tmp_path):
    write(tmp_path / "out", add_bos=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("ab").input_ids == [256, 97, 98]
    assert tokenizer("ab", "c").input_ids == [256, 97, 98, 256, 99]
    assert tokenizer("ab", add_special_tokens=False).input_ids == [97, 98]
    ours = HuggingFaceTokenizer(tmp_path / "out")
    assert ours.adds_bos and ours.encode("ab") == [97, 98]
    write(tmp_path / "without", add_bos=False)
    assert not HuggingFaceTokenizer(tmp_path / "without").adds_bos


@pytest.mark.parametrize("trained", [None, False, True])
@pytest.mark.parametrize("adds", [False, True])
def test_a_copied_tokenizer_that_begins_texts_otherwise_is_told_of(trained, adds, tmp_path, caplog):
    write_bytes_tokenizer(tmp_path, adds)
    with caplog.at_level(logging.WARNING, logger="torchtitan"):
        (tmp_path / "out").mkdir()
        assets = ExportAssets(str(tmp_path), 128, add_bos=trained)
        write_assets(tmp_path / "out", ARGS, torch.float32, assets)
    told = "prompts will not begin like the documents of the run" in caplog.text
    assert told == (trained is not None and trained != adds)


def test_warnings_name_the_folder_as_it_will_be_called(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(type(ARGS), "to_hf_config", lambda args: None)
    with caplog.at_level(logging.WARNING, logger="torchtitan"):
        (tmp_path / "step-20-hf.partial").mkdir()
        assets = ExportAssets(str(tmp_path / "none"), 128)
        write_assets(tmp_path / "step-20-hf.partial", ARGS, torch.float32, assets)
    assert f"{tmp_path}/step-20-hf is saved without a tokenizer: " in caplog.text
    assert f"{tmp_path}/step-20-hf: no config.json, as Llama3ModelArgs has no" in caplog.text


def with_special_tokens(folder, *names):
    """A tokenizer of bytes with tokens 258, 259 and so on."""
    folder.mkdir()
    write_bytes_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("kept", [False, True])
def test_what_ends_a_turn_ends_a_text(kept, tmp_path):
    tokenizer = with_special_tokens(tmp_path / "in", "<|im_start|>", "<|im_end|>")
    config = export_config(ARGS) | {"eos_token_id": EOS}
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    for conversations in (False, True):
        folder = tmp_path / f"out {conversations}"
        folder.mkdir()
        like = (tmp_path / "base",) if kept else ()
        template = CHATML if conversations else ""
        assets = ExportAssets(str(tokenizer), 128, like, template, conversations)
        write_assets(folder, ARGS, torch.float32, assets)
        told = json.loads((folder / "config.json").read_text())["eos_token_id"]
        assert set(told if conversations else [told]) == ({EOS, 259} if conversations else {EOS})


@pytest.mark.parametrize("of_run", [False, True])
def test_what_ended_a_turn_of_a_run_is_known_to_all_that_run_its_model(of_run, tmp_path):
    """By the tokenizer's own template, or by data.chat_template."""
    text = "{% for m in messages %}{{ m.content }}<|bos|>{% endfor %}"  # any token but eos
    tokenizer = with_special_tokens(tmp_path / "in")
    template = tmp_path / "own.jinja" if of_run else tokenizer / "chat_template.jinja"
    template.write_text(text)
    options = [f"--data.chat_template={template}"] if of_run else []
    export_a_run(tmp_path, CHAT * 9, f"--model.tokenizer_path={tokenizer}", *options)
    ours, exported = (tmp_path / "run" / "checkpoint" / name for name in ("step-1", "step-1-hf"))
    assert cli.main(["convert", "to-hf", str(ours), str(tmp_path / "converted")]) == 0
    for name in ("config.json", "generation_config.json", "chat_template.jinja"):
        files = [folder / name for folder in (exported, tmp_path / "converted")]
        texts = [file.read_text() if file.is_file() else "" for file in files]
        assert texts[0] == texts[1], name
    for folder in (ours, exported, tmp_path / "converted"):
        assert open_source(ModelOptions(str(folder))).stop_tokens == {256, 257}, folder


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages[-1].content }}<b>\n<|eos|>", 258),
        ("{% for m in messages %}<b>{{ m.content }}{% endfor %}", None),
        ("{{ raise_exception('no') }}", None),
        ("{{", None),
    ],
)
def test_what_ends_a_turn_by_other_templates(template, expected, tmp_path):
    folder = with_special_tokens(tmp_path / "in", "<b>")
    if expected:
        template = "{% if not add_generation_prompt %}" + template + "{% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    assert end_of_turn(folder) == expected


def test_a_template_that_is_gone_is_told(tmp_path, caplog):
    folder = with_special_tokens(tmp_path / "in", "<b>")
    assert end_of_turn(folder, str(tmp_path / "gone.jinja")) is None
    assert "ends a turn is unknown: data.chat_template: " in caplog.text


@pytest.mark.parametrize("document", ["Hi there.", CHAT])
def test_a_loader_knows_of_conversations_before_it_reads_a_batch(document, tmp_path):
    (tmp_path / "data.jsonl").write_text(f"{json.dumps({'text': document})}\n")
    config = JobConfig()
    config.training.dataset = "jsonl"
    config.training.dataset_path = str(tmp_path / "data.jsonl")
    loader = build_dataloader(config, BytesTokenizer(), 0, 1)
    assert loader.has_conversations == (document is CHAT)
