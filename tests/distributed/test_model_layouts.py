"""Every model trains in every kind of layout as in one process; see test_layouts.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from equality import assert_equal_runs
from test_layouts import train_layout

TP2 = "--parallelism.tensor_parallel_degree=2"
PP2 = "--parallelism.pipeline_parallel_degree=2"
EP2 = "--parallelism.expert_parallel_degree=2"
CP2 = "--parallelism.context_parallel_degree=2"
LAYOUTS = {
    "fsdp2": (2, 4),
    "tp2": (2, 8, TP2),
    "ep2": (2, 4, EP2),
    "tp2_ep2": (2, 8, TP2, EP2),
    "pp2": (2, 8, PP2),
    "pp2_zbv": (2, 8, PP2, "--parallelism.pipeline_parallel_schedule=ZBVZeroBubble"),
    "cp2": (2, 8, CP2),
    "cp2_ulysses": (2, 8, CP2, "--parallelism.context_parallel_method=ulysses"),
    "fsdp2xtp2": (4, 4, TP2),
    "pp2xfsdp2xtp2": (8, 4, PP2, TP2),
    "fsdp2xcp2xtp2": (8, 4, CP2, TP2),
}
MODELS = {
    "llama3": "debugmodel",
    "qwen3": "debugmodel",
    "qwen3_moe": "debugmodel_moe",
    "deepseek_v3": "debugmodel",
    "gpt_oss": "debugmodel",
    "llama4": "debugmodel",
    "gemma3": "debugmodel",
}
DENSE = ("llama3", "qwen3", "gemma3")
CASES = [
    (model, layout)
    for model in MODELS
    for layout in LAYOUTS
    if not ("ep2" in layout and model in DENSE)
]


def run(model: str, folder: Path, processes: int, batch: int, *options: str) -> Path:
    # Two chunks of Llama 4's debug model are in a sequence.
    name, seq_len = model.removesuffix("_moe"), 128 if model == "llama4" else 64
    options = (
        f"--model.name={name}",
        f"--model.flavor={MODELS[model]}",
        f"--training.seq_len={seq_len}",
        # With its usual eps, Adam moves a weight whose gradient is rounding noise as far as others.
        # That makes differences 10 times as large, and the closest of 40,000 choices of a router
        # fall the other way: it is by a difference of 3e-7 between logits.
        "--optimizer.lr=3e-4",
        "--optimizer.eps=1e-4",
        *options,
    )
    return train_layout(folder, processes, batch, *options)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("one_process")
    return {model: run(model, folder / model, 1, 8) for model in MODELS}


@pytest.mark.long
@pytest.mark.parametrize(("model", "layout"), CASES)
def test_layout_trains_like_one_process(
    model: str, layout: str, one_process: dict[str, Path], tmp_path: Path
) -> None:
    trained = run(model, tmp_path / layout, *LAYOUTS[layout])
    assert_equal_runs(trained, one_process[model])
