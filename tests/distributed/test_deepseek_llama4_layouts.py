"""DeepSeek-V3 and Llama 4 train in every kind of layout as in one process; see test_layouts.py."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from test_layouts import train_layout

MODELS = ("deepseek_v3", "llama4")
TP2 = "--parallelism.tensor_parallel_degree=2"
EP2 = "--parallelism.expert_parallel_degree=2"
CP2 = "--parallelism.context_parallel_degree=2"
LAYOUTS = {
    "fsdp2": (2, 4),
    "tp2": (2, 8, TP2),
    "ep2": (2, 4, EP2),
    "tp2_ep2": (2, 8, TP2, EP2),
    "pp2": (2, 8, "--parallelism.pipeline_parallel_degree=2"),
    "cp2": (2, 8, CP2),
    "cp2_ulysses": (2, 8, CP2, "--parallelism.context_parallel_method=ulysses"),
}
STEPS = 10


def run(model: str, folder: Path, processes: int, batch: int, *options: str) -> list[dict]:
    # Two chunks of Llama 4's debug model are in a sequence.
    shared = (f"--model.name={model}", f"--training.steps={STEPS}", "--training.seq_len=128")
    return train_layout(folder, processes, batch, *shared, *options)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    folder = tmp_path_factory.mktemp("one_process")
    return {model: run(model, folder / model, 1, 8) for model in MODELS}


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_layout_gives_the_losses_of_one_process(
    model: str, layout: str, one_process: dict[str, list[dict]], tmp_path: Path
) -> None:
    lines = run(model, tmp_path / layout, *LAYOUTS[layout])
    assert len(lines) == len(one_process[model]) == STEPS
    for line, expected in zip(lines, one_process[model], strict=True):
        for key in ("loss", "grad_norm"):
            assert math.isclose(line[key], expected[key], rel_tol=1e-4), (key, line, expected)
