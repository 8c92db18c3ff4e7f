"""The trainer's validation gives one process's losses on every layout, documents or not."""

from __future__ import annotations

from pathlib import Path

import pytest
from equality import assert_equal_curves
from harness import read_lines
from test_layouts import train_layout

VALIDATION = (
    "--training.steps=4",
    "--validation.enable",
    "--validation.freq=2",
    "--validation.steps=2",
    "--validation.local_batch_size=4",  # two batches of it, whatever the layout
    "--validation.seq_len=32",
    "--training.document_mask",
)
EXPERTS = ("--model.name=qwen3", "--model.flavor=debugmodel_moe")
CP2 = "--parallelism.context_parallel_degree=2"
TP2 = "--parallelism.tensor_parallel_degree=2"
EP2 = "--parallelism.expert_parallel_degree=2"
LAYOUTS = {
    "cp2": (2, 8, CP2),
    "ep2": (2, 4, EP2, *EXPERTS),
    "cp2_ulysses": (2, 8, CP2, "--parallelism.context_parallel_method=ulysses"),
    "tp2": (2, 8, TP2),
    "fsdp2xcp2": (4, 4, CP2),
    "cp2xtp2": (4, 8, CP2, TP2),
}
QUICK = ("cp2", "ep2")


def validate(folder: Path, processes: int, local_batch_size: int, *options: str) -> list[dict]:
    run = train_layout(folder, processes, local_batch_size, *VALIDATION, *options)
    return read_lines(run / "validation.jsonl")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, list[dict]]:
    """Has the model experts? -> its validation losses."""
    folder = tmp_path_factory.mktemp("one")
    return {
        False: validate(folder / "dense", 1, 8),
        True: validate(folder / "experts", 1, 8, *EXPERTS),
    }


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.long) for name in LAYOUTS],
)
def test_validation_gives_the_losses_of_one_process(
    name: str, one_process: dict[bool, list[dict]], tmp_path: Path
) -> None:
    lines = validate(tmp_path, *LAYOUTS[name])
    assert len(lines) == 2
    assert_equal_curves(lines, one_process[EP2 in LAYOUTS[name]])
