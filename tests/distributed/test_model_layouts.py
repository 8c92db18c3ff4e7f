"""Every model trains in every kind of layout as in one process; see test_layouts.py."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from test_layouts import train_layout

LAYOUTS = {
    "fsdp2": (2, 4),
    "tp2": (2, 8, "--parallelism.tensor_parallel_degree=2"),
    "ep2": (2, 4, "--parallelism.expert_parallel_degree=2"),
    "pp2": (2, 8, "--parallelism.pipeline_parallel_degree=2"),
    "cp2": (2, 8, "--parallelism.context_parallel_degree=2"),
    "cp2_ulysses": (
        2,
        8,
        "--parallelism.context_parallel_degree=2",
        "--parallelism.context_parallel_method=ulysses",
    ),
}
CASES = [("gpt_oss", layout) for layout in LAYOUTS]
# Gemma 3 has no experts, and its tied weights are in the first and the last stage of a pipeline.
CASES += [("gemma3", layout) for layout in LAYOUTS if layout not in ("ep2", "pp2")]
STEPS = 10


def run(model: str, folder: Path, processes: int, batch: int, *options: str) -> list[dict]:
    options = (f"--model.name={model}", f"--training.steps={STEPS}", *options)
    return train_layout(folder, processes, batch, *options)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    folder = tmp_path_factory.mktemp("one_process")
    return {model: run(model, folder / model, 1, 8) for model in ("gpt_oss", "gemma3")}


@pytest.mark.long
@pytest.mark.parametrize(("model", "layout"), CASES)
def test_layout_gives_the_losses_of_one_process(
    model: str, layout: str, one_process: dict[str, list[dict]], tmp_path: Path
) -> None:
    lines = run(model, tmp_path / layout, *LAYOUTS[layout])
    assert len(lines) == len(one_process[model]) == STEPS
    for line, expected in zip(lines, one_process[model], strict=True):
        for key in ("loss", "grad_norm"):
            assert math.isclose(line[key], expected[key], rel_tol=1e-4), (key, line, expected)
