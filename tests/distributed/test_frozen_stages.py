"""Pipeline stages without a trained weight: the others train as in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_llama
from equality import SAVE, assert_equal_runs
from harness import short_and_long, train

FROZEN = {
    "first": r"tok_embeddings|layers\.[01]\.",
    "middle": r"layers\.[12]\.",
    "last": r"layers\.[23]\.|^norm|output",
    "all but one": r"^(?!layers\.2)",
}
PP2 = ("--parallelism.pipeline_parallel_degree=2",)
PP4 = ("--parallelism.pipeline_parallel_degree=4",)
ZBV, INTERLEAVED, DUAL = (
    (*PP2, f"--parallelism.pipeline_parallel_schedule={name}")
    for name in ("ZBVZeroBubble", "InterleavedZeroBubble", "DualPipeV")
)
FSDP2 = "--parallelism.data_parallel_shard_degree=2"
TP2 = "--parallelism.tensor_parallel_degree=2"
LAYOUTS = {"zbv": (2, "all but one", ZBV)}
LONG_LAYOUTS = {
    "last": (2, "last", PP2),
    "pp4": (4, "middle", PP4),
    "fsdp": (4, "first", (*PP2, FSDP2)),
    "pp4_fsdp": (8, "all but one", (*PP4, FSDP2)),
    "tp": (4, "first", (*PP2, TP2)),
    "zbv_last": (2, "last", ZBV),
    "zbv_fsdp": (4, "first", (*ZBV, FSDP2)),
    "zbv_full_ac": (2, "middle", (*ZBV, "--activation_checkpoint.mode=full")),
    "interleaved_zero_bubble": (2, "all but one", INTERLEAVED),
    "dual_pipe_v": (2, "first", DUAL),
    "compiled": (2, "first", (*PP2, "--compile.enable", "--compile.backend=aot_eager")),
}
OPTIONS = [*tiny_llama.OPTIONS, *SAVE, "--metrics.block_norm_freq=2", "--validation.enable"]


def run(folder: Path, frozen: str, *options: str, ranks: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    config = folder / "job.toml"
    config.write_text(f"[[optimizer.rules]]\npattern = '{FROZEN[frozen]}'\nlr_scale = 0.0\n")
    train(folder / "run", f"--job.config_file={config}", *OPTIONS, *options, ranks=ranks)
    return folder / "run"


@pytest.mark.parametrize("layout", short_and_long(LAYOUTS, LONG_LAYOUTS))
def test_a_pipeline_with_a_frozen_stage_trains_like_one_process(
    layout: tuple, tmp_path: Path
) -> None:
    ranks, frozen, options = layout
    local = f"--training.local_batch_size={4 if FSDP2 in options else 8}"
    expected = run(tmp_path / "one", frozen, "--training.local_batch_size=8")
    assert_equal_runs(run(tmp_path / "pp", frozen, local, *options, ranks=ranks), expected)


def test_a_run_continues_with_a_frozen_stage_and_without(tmp_path: Path) -> None:
    whole = "--training.local_batch_size=8"
    expected = run(tmp_path / "one", "first", whole)
    for steps, options in ((2, ()), (4, PP2), (6, ())):
        part = f"--training.steps={steps}", "--lr_scheduler.total_steps=6"
        run(tmp_path / "resumed", "first", whole, *part, *options, ranks=1 + len(options))
    assert_equal_runs(tmp_path / "resumed" / "run", expected)
