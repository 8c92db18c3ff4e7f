"""A checkpoint saved in any layout resumes in every other, weights, optimizer and data alike."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from equality import assert_equal_curves, assert_equal_weights, newest_weights
from harness import read_lines
from test_layouts import train_layout

TP2 = "--parallelism.tensor_parallel_degree=2"
PP2 = "--parallelism.pipeline_parallel_degree=2"
EP2 = "--parallelism.expert_parallel_degree=2"
CP2 = "--parallelism.context_parallel_degree=2"
ETP2 = "--parallelism.expert_tensor_parallel_degree=2"
REPLICATE2 = "--parallelism.data_parallel_replicate_degree=2"
ZBV = "--parallelism.pipeline_parallel_schedule=ZBVZeroBubble"
LAYOUTS = {
    "one": (1, 8),
    "fsdp2": (2, 4),
    "ddp2": (2, 4, REPLICATE2, "--parallelism.data_parallel_shard_degree=1"),
    "tp2": (2, 8, TP2),
    "cp2": (2, 8, CP2),
    "pp2_zbv": (2, 8, PP2, ZBV),
    "ep2": (2, 4, EP2),
    "hsdp2x2": (4, 2, REPLICATE2),
    "pp2xfsdp2_ep2": (4, 4, PP2, EP2),
    "ep2xtp2xetp2": (4, 4, EP2, TP2, ETP2),
}
SAVED_AT, STEPS = 2, 4
SHARED = (
    "--model.name=qwen3",
    "--model.flavor=debugmodel_moe",
    "--optimizer.lr=3e-4",
    "--lr_scheduler.warmup_steps=0",
    "--lr_scheduler.decay_ratio=0",  # so that the schedule does not depend on the last step
    "--checkpoint.keep_latest_k=0",
)


def run(folder: Path, layout: str, steps: int) -> Path:
    processes, local_batch_size, *options = LAYOUTS[layout]
    options += [*SHARED, f"--training.steps={steps}"]
    return train_layout(folder, processes, local_batch_size, *options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process that is not interrupted."""
    return run(tmp_path_factory.mktemp("whole"), "one", STEPS)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("saved_in", LAYOUTS)
def test_every_layout_resumes(saved_in: str, whole: Path, tmp_path: Path) -> None:
    saved = run(tmp_path / "saved", saved_in, SAVED_AT)
    for layout in LAYOUTS:
        shutil.copytree(saved / "checkpoint", tmp_path / layout / "run" / "checkpoint")
        resumed = run(tmp_path / layout, layout, STEPS)
        lines = read_lines(resumed / "metrics.jsonl")
        assert_equal_curves(lines, read_lines(whole / "metrics.jsonl")[SAVED_AT:])
        assert_equal_weights(newest_weights(resumed), newest_weights(whole))
        shutil.rmtree(tmp_path / layout)
