"""The commands of docs/generating.md do what the page says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import tiny_hf
import tiny_llama
from harness import command, train
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

PAGE = (Path(__file__).parents[2] / "docs" / "generating.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S)
    for line in block.splitlines()
    if line
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a run, a Hugging Face folder and texts, under the names in the page."""
    folder = tmp_path_factory.mktemp("page")
    options = [*tiny_llama.OPTIONS, "--checkpoint.enable", "--checkpoint.interval=6"]
    train(folder / "outputs", *options)
    model = folder / "Qwen3-0.6B"
    tiny_hf.hf_model("qwen3", vocab_size=300).save_pretrained(model)
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel()
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=280, special_tokens=["<end>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["once upon a time there was a test"] * 9, trainer)
    tokenizer.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    (folder / "notes.txt").write_text("some notes of mine\n" * 40)
    (folder / "prompts.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    return folder


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command(line: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "--tasks" in line:
        pytest.skip("its tasks need a network; see test_lm_eval.py")
    words, ranks = shlex.split(line), 1
    if words[0] == "torchrun":
        ranks = int(words[words.index("--nproc-per-node") + 1])
        words = words[words.index("torchtitan") :]
    monkeypatch.chdir(workplace)
    done = command(*words[1:], ranks=ranks)
    assert done.exit_code == 0, done.err
    if words[1] == "eval":
        assert re.search(r"^perplexity +\d", done.out, re.M), done.out
    else:
        assert "tokens/s" in done.err and len(done.out) > 20


def test_the_python_example(workplace, monkeypatch, capsys):
    [code] = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    monkeypatch.chdir(workplace)
    exec(compile(code, "docs/generating.md", "exec"), {})
    assert capsys.readouterr().out
