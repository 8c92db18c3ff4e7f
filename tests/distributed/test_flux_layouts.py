"""FLUX.1 trains and validates in every layout as in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from equality import SAVE, assert_equal_curves, assert_equal_runs
from harness import read_lines, train

from torchtitan.authoring import conformance_tests

ROOT = Path(__file__).parents[2]
OPTIONS = (
    f"--job.config_file={ROOT}/torchtitan/models/flux/train_configs/debug_model.toml",
    *("--training.seq_len=16", "--training.steps=4", "--training.local_batch_size=2"),
    "--training.global_batch_size=4",
    *("--validation.freq=4", "--validation.steps=3", "--metrics.log_freq=1"),
    *("--optimizer.lr=3e-4", "--optimizer.eps=1e-4", "--lr_scheduler.warmup_steps=1", *SAVE),
)
TP2 = "--parallelism.tensor_parallel_degree=2"
PP2 = "--parallelism.pipeline_parallel_degree=2"
CP2 = "--parallelism.context_parallel_degree=2"
ULYSSES = "--parallelism.context_parallel_method=ulysses"
LAYOUTS = {
    "fsdp2": (2,),
    "tp2": (2, TP2),
    "pp2": (2, PP2),
    "cp2": (2, CP2),
    "cp2_ulysses": (2, CP2, ULYSSES),
    "fsdp2xtp2": (4, TP2),
    "cp2xtp2": (4, CP2, ULYSSES, TP2),
    "cp2xpp2": (4, CP2, PP2),
    "cp2xfsdp2_compiled": (4, CP2, "--compile.enable", "--compile.backend=aot_eager"),
}
LONG = ("fsdp2", "cp2_ulysses", "fsdp2xtp2", "cp2xtp2", "cp2xpp2", "cp2xfsdp2_compiled")


def run(folder: Path, ranks: int, *options: str) -> Path:
    train(folder, *OPTIONS, *options, ranks=ranks)
    return folder


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("flux") / "one", 1)


@pytest.mark.parametrize(
    "layout", [pytest.param(n, marks=[pytest.mark.long] if n in LONG else []) for n in LAYOUTS]
)
def test_layouts_are_equal(layout, one_process, tmp_path):
    ranks, *options = LAYOUTS[layout]
    folder = run(tmp_path / "run", ranks, *options)
    assert_equal_runs(folder, one_process)
    expected = read_lines(one_process / "validation.jsonl")
    assert_equal_curves(read_lines(folder / "validation.jsonl"), expected)


test_what_the_platform_learned_of_it = conformance_tests(
    "flux", only=["learning.gradients", "adapter.config_json"]
)
"""Its layers start at zero, several in a row, and its `config.json` is that of another library."""

test_conformance = pytest.mark.long(conformance_tests("flux"))
