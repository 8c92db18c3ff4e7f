"""`torchtitan generate`: output, options, and a user's mistakes."""

import json

import pytest
import tiny_hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from torchtitan.cli import main
from torchtitan.commands.generate import Options, read_prompts, render_chats
from torchtitan.generation.load import ModelOptions, open_source
from torchtitan.generation.text import encode_prompt


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    tiny_hf.hf_model("llama3", max_position_embeddings=64).save_pretrained(folder)
    return folder


@pytest.fixture
def generate(folder):
    def run(*options: str) -> int:
        return main(["generate", "--checkpoint", str(folder), "--tokenizer", "bytes", *options])

    return run


def test_one_text_is_prompt_and_continuation(generate, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    options = ["--max-new-tokens", "12", "--ignore-eos", "--json", str(out)]
    assert generate("--prompt", "def ", *options) == 0
    captured = capsys.readouterr()
    [line] = [json.loads(line) for line in out.read_text().splitlines()]
    assert captured.out == f"def {line['text']}\n"
    assert "12 tokens in" in captured.err
    assert line["prompt"] == "def " and line["finish_reason"] == "length"
    assert len(line["tokens"]) == 12


def test_several_texts_come_in_order(generate, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "first"}\n{"prompt": ""}\n')
    options = ["--prompt", "zero", "--prompt-file", str(prompts), "--num-samples", "2"]
    options += ["--max-new-tokens", "6", "--top-k", "50", "--json", str(out)]
    assert generate(*options, "--batch-size", "4") == 0
    shown = capsys.readouterr().out
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["zero", "zero", "first", "first", "", ""]
    assert shown == "".join(
        f"--- prompt {i // 2 + 1}, sample {i % 2 + 1}\n{line['prompt']}{line['text']}\n"
        for i, line in enumerate(lines)
    )
    assert lines[0]["tokens"] != lines[1]["tokens"]

    # The same texts in other batches.
    assert generate(*options, "--batch-size", "1") == 0
    assert [json.loads(line) for line in out.read_text().splitlines()] == lines
    assert generate(*options, "--seed", "1") == 0
    assert [json.loads(line) for line in out.read_text().splitlines()] != lines


def test_a_whole_file_is_a_prompt(generate, tmp_path, capsys):
    file = tmp_path / "prompt.txt"
    file.write_text("two\nlines")
    assert generate("--prompt-file", str(file), "--max-new-tokens", "1") == 0
    assert capsys.readouterr().out.startswith("two\nlines")


def test_a_chat_is_rendered_up_to_the_answer(generate, tmp_path):
    out, prompts = tmp_path / "out.jsonl", tmp_path / "prompts.jsonl"
    turns = [("user", "1"), ("assistant", "2"), ("user", "3")]
    messages = [{"role": role, "content": text, "name": None} for role, text in turns]
    prompts.write_text(json.dumps({"messages": messages[:1]}) + '\n{"prompt": "x"}\n')
    options = ["--chat", "--max-new-tokens", "1", "--json", str(out)]
    assert generate("--prompt", "Hi", "--prompt-file", str(prompts), *options) == 0
    rendered = [json.loads(line)["prompt"] for line in out.read_text().splitlines()]
    assert rendered == [
        f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in ("Hi", "1", "x")
    ]


def test_a_chat_has_one_bos_and_ends_with_the_turn(generate, folder, tmp_path, capsys):
    own, out = tmp_path / "tokenizer", tmp_path / "out.jsonl"
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(256)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(single="w2 $A", special_tokens=[("w2", 2)])
    words.add_special_tokens(["w2", "w3", "w4"])
    hf = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w2", eos_token="w4")
    hf.chat_template = (
        "{{ bos_token }} {% for m in messages %}{{ 'w9 ' if m.role == 'assistant' }}"
        "{{ m.content }} w3 {% endfor %}"
        "{% if add_generation_prompt %}w9 {% endif %}"
    )
    hf.save_pretrained(own)
    expected = hf.apply_chat_template([{"role": "user", "content": "w7 w8"}], tokenize=False)
    assert expected == "w2 w7 w8 w3 "
    options = ["--chat", "--prompt", "w7 w8", "--max-new-tokens", "1", "--json", str(out)]
    assert generate(*options, "--tokenizer", str(own)) == 0
    assert json.loads(out.read_text())["prompt"] == "w2 w7 w8 w3 w9 "
    source = open_source(ModelOptions(str(folder), tokenizer=str(own)))
    [text] = render_chats(source, ["w7 w8"])
    assert encode_prompt(source.tokenizer, text, False) == [2, 7, 8, 3, 9]
    assert source.stop_tokens >= {3, 4}


def test_new_tokens_end_where_the_model_does(generate, tmp_path):
    out = tmp_path / "out.jsonl"
    assert generate("--prompt", "x" * 60, "--temperature", "0", "--json", str(out)) == 0
    assert len(json.loads(out.read_text())["tokens"]) == 4


MISTAKES = {
    "no prompt": ([], "no prompt"),
    "no file": (["--prompt-file", "/no/such"], "/no/such cannot be read: No such file"),
    "temperature": (["--prompt", "x", "--temperature", "-1"], "temperature = -1.0"),
    "top-p": (["--prompt", "x", "--top-p", "1.5"], "top_p = 1.5"),
    "top-k": (["--prompt", "x", "--top-k", "0"], "top_k = 0"),
    "tokens": (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens 0"),
    "long prompt": (["--prompt", "x" * 64], "has 64 tokens"),
    "long text": (["--prompt", "x" * 60, "--max-new-tokens", "5"], "at most 64"),
    "model": (["--prompt", "x", "--model", "qwen4", "--flavor", "1B"], "Did you mean 'qwen3'"),
    "shapes": (
        ["--prompt", "x", "--model", "llama3", "--flavor", "debugmodel"],
        "config.json is of another model: dim = 64 (now 256)",
    ),
    "ranks": (["--prompt", "x", "--tensor-parallel-degree", "2"], "number of processes, 1,"),
    "json": (["--prompt", "x", "--max-new-tokens", "1", "--json", "/no/such/file"], "--json"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake(mistake, generate, capsys):
    options, message = MISTAKES[mistake]
    with pytest.raises(SystemExit) as caught:
        generate(*options)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.count("error: ") == 1 and message in err, err


def test_a_prompt_may_have_any_character_and_blank_lines_are_none(tmp_path):
    prompts = ["one\u2028line\x85\u2029", "zwei \x1c"]
    file = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    file.write_text("\n" + "\r\n \n".join(lines) + "\n\n", encoding="utf-8")
    assert read_prompts(Options("folder", prompt_file=str(file))) == prompts


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"messages": [{"role": "user"}]}', "prompt 1: message 0 (counted from 0) has no text"),
        ('{"messages": ["Hi"]}', "prompts.jsonl:1: the field 'messages' is a list, but not of"),
        ('{"text": "Hi"}', 'prompts.jsonl:1: not {"prompt": "..."} or {"messages": [...]}'),
    ],
)
def test_a_mistake_in_messages(generate, tmp_path, capsys, line, problem):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(line)
    with pytest.raises(SystemExit):
        generate("--chat", "--prompt-file", str(prompts))
    assert problem in capsys.readouterr().err


def test_a_damaged_line_of_prompts(generate, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "first"}\n\n{"text": "x"}\n')
    with pytest.raises(SystemExit):
        generate("--prompt-file", str(prompts))
    assert f"{prompts}:3: not" in capsys.readouterr().err
