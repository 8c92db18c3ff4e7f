"""Two ranks that share a model generate what one does, and two data ranks find the same loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_hf
from harness import command, on_ranks

from torchtitan.generation.generator import Generator
from torchtitan.generation.load import ModelOptions, load_model, open_source
from torchtitan.generation.sampling import Sampling

PROMPTS = [list(range(n)) for n in (1, 3, 2 * tiny_hf.WINDOW)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a Hugging Face folder of each model."""
    folder = tmp_path_factory.mktemp("models")
    for name in tiny_hf.CONFIGS:
        tiny_hf.hf_model(name).save_pretrained(folder / name)
    return folder


def generate_all(folder: Path, degree: int) -> dict[str, list[list[int]]]:
    """What each model continues the prompts with, greedily, then drawn."""
    results = {}
    for name in tiny_hf.CONFIGS:
        options = ModelOptions(
            str(folder / name), tokenizer="bytes", tensor_parallel_degree=degree, dtype="float32"
        )
        loaded = load_model(open_source(options))
        generator = Generator(loaded.model, group=loaded.tp_group)
        assert generator.uses_cache
        completions = generator.generate(PROMPTS, 6, Sampling(temperature=0))
        completions += generator.generate(PROMPTS[:2], 4, Sampling(top_p=0.8, seed=1))
        generator.uses_cache = False
        completions += generator.generate(PROMPTS[:1], 3, Sampling(temperature=0))
        results[name] = [completion.tokens for completion in completions]
    return results


def write_results(folder: Path, degree: int) -> None:
    import torch.distributed as dist

    results = generate_all(folder, degree)
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(results))


def test_two_tensor_parallel_ranks_generate_the_same_tokens(folder):
    on_ranks(2, write_results, folder, 2)
    expected = generate_all(folder, 1)
    for rank in (0, 1):
        assert json.loads((folder / f"rank-{rank}.json").read_text()) == expected


@pytest.mark.parametrize("degree", [1, 2], ids=["data parallel", "tensor parallel"])
def test_the_perplexity_is_the_same_on_two_ranks(folder, tmp_path, degree):
    text = tmp_path / "texts"
    text.mkdir()
    for number in range(7):  # 7 documents and 9 sequences of different lengths
        (text / f"{number}.txt").write_text(f"document {number}. " * 5 * (number + 1))

    results = []
    for ranks, tp in ((1, 1), (2, degree)):
        out = tmp_path / f"{ranks}.json"
        done = command(
            *["eval", "--checkpoint", str(folder / "qwen3"), "--tokenizer", "bytes"],
            *["--dataset", "text", "--dataset-path", str(text), "--seq-len", "256"],
            *["--batch-size", "2", "--json", str(out), "--tensor-parallel-degree", str(tp)],
            ranks=ranks,
        )
        assert done.exit_code == 0, done.err
        assert done.out.count("perplexity") == 1  # of rank 0
        results.append(json.loads(out.read_text()))
    one, two = results
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
    assert (two["tokens"], two["bytes"]) == (one["tokens"], one["bytes"])


def test_the_command_generates_on_two_ranks(folder, tmp_path):
    words = ["generate", "--checkpoint", str(folder / "llama3"), "--tokenizer", "bytes"]
    words += ["--prompt", "x", "--temperature", "0", "--max-new-tokens", "5", "--json"]
    tokens = []
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}.jsonl"
        layout = ["--tensor-parallel-degree", str(ranks)]
        done = command(*words, str(out), *layout, ranks=ranks)
        assert done.exit_code == 0, done.err
        tokens.append(json.loads(out.read_text())["tokens"])
    assert tokens[0] == tokens[1]
