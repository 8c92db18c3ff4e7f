"""A model whose batches are no texts trains in every layout as in one process."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from equality import SAVE, assert_equal_curves, assert_equal_runs
from harness import command, read_lines, train
from tiny_diffusion import OPTIONS

TESTS = Path(__file__).parents[1]
FLOAT32 = "--training.mixed_precision_param=float32"
TP2 = "--parallelism.tensor_parallel_degree=2"
PP2 = "--parallelism.pipeline_parallel_degree=2"
LAYOUTS = {"fsdp2": (2,), "tp2": (2, TP2), "pp2": (2, PP2), "fsdp2xpp2": (4, PP2)}
LONG = ("fsdp2xpp2",)


def run(folder: Path, ranks: int, *options: str) -> Path:
    passes = ("--training.local_batch_size=4", *SAVE)
    train(folder, *OPTIONS, *passes, *options, ranks=ranks)
    return folder


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("diffusion") / "one", 1, FLOAT32)


def test_it_learns(one_process):
    lines = read_lines(one_process / "metrics.jsonl")
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    assert lines[-1]["tokens_seen"] == 8 * 8 * 16  # patches


@pytest.mark.parametrize(
    "layout", [pytest.param(n, marks=[pytest.mark.long] if n in LONG else []) for n in LAYOUTS]
)
def test_layouts_are_equal(layout, one_process, tmp_path):
    ranks, *options = LAYOUTS[layout]
    folder = run(tmp_path / "run", ranks, FLOAT32, *options)
    assert_equal_runs(folder, one_process)
    expected = read_lines(one_process / "validation.jsonl")
    assert len(expected) == 2
    assert_equal_curves(read_lines(folder / "validation.jsonl"), expected)


def test_inputs_in_floating_point_are_rounded_alike_by_one_process_and_by_fsdp(tmp_path):
    one, two = (run(tmp_path / str(ranks), ranks, "--training.steps=1") for ranks in (1, 2))
    first = [read_lines(folder / "metrics.jsonl") for folder in (one, two)]
    assert_equal_curves(*first, loss_tolerance=2e-3, norm_tolerance=2e-2)


def test_exports_have_no_tokenizer_that_the_model_does_not_read_by(tmp_path):
    last = run(tmp_path / "run", 1, "--training.steps=1", "--checkpoint.last_save_in_hf")
    ours = last / "checkpoint" / "step-1"
    options = ("--custom-import", "tiny_diffusion")
    assert command("convert", "to-hf", str(ours), str(tmp_path / "hf"), *options).exit_code == 0
    for folder in (last / "checkpoint" / "step-1-hf", tmp_path / "hf"):
        assert not list(folder.glob("*token*"))
        assert (folder / "model-00001-of-00001.safetensors").is_file()
    options = (*options, "--tokenizer", "bytes")
    assert command("convert", "to-hf", str(ours), str(tmp_path / "told"), *options).exit_code == 0
    assert (tmp_path / "told" / "tokenizer.json").is_file()


def test_context_parallelism_says_what_it_divides(tmp_path):
    done = command(
        "train",
        *OPTIONS,
        "--parallelism.context_parallel_degree=2",
        f"--job.dump_folder={tmp_path}",
        ranks=2,
    )
    assert done.exit_code == 2
    assert "forward() of tiny_diffusion takes no positions" in done.err


def test_the_page_shows_what_is_trained_here():
    """docs/own_data.md, Data other than text."""
    page = (TESTS.parent / "docs" / "own_data.md").read_text()
    shown = ast.parse(page.partition("# diffusion.py\n")[2].partition("```")[0])
    here = {}
    for node in ast.walk(ast.parse((TESTS / "tiny_diffusion.py").read_text())):
        if isinstance(node, ast.FunctionDef):
            here.setdefault(node.name, []).append(_body(node))
    for function in shown.body:
        assert _body(function) in here[function.name], function.name


def _body(function: ast.FunctionDef) -> str:
    """Without docstring and annotations."""
    body = function.body[ast.get_docstring(function) is not None :]
    return "\n".join(map(ast.unparse, body))
