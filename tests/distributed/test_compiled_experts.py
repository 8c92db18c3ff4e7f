"""Blocks whose experts are on other ranks are compiled, also where they are checkpointed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import on_ranks
from test_expert_checkpoints import ARGS
from torch._dynamo.utils import counters

from torchtitan.config import JobConfig
from torchtitan.distributed.init import initialize_weights
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.models.qwen3 import Qwen3Model, parallelize_qwen3

MODES = ("none", "full", "selective")


def compiled_operations(mode: str, degrees: dict[str, int]) -> int:
    dims = ParallelDims(**degrees, world_size=dist.get_world_size())
    config = JobConfig()
    config.activation_checkpoint.mode = mode
    config.compile.enable, config.compile.backend = True, "aot_eager"
    parallelism = config.parallelism
    parallelism.tensor_parallel_degree, parallelism.expert_parallel_degree = dims.tp, dims.ep
    with torch.device("meta"):
        model = Qwen3Model(ARGS)
    model = parallelize_qwen3(model, dims.world_mesh, dims, config)
    initialize_weights(model, 0, torch.device("cpu"))
    torch._dynamo.reset()
    counters.clear()
    model(torch.arange(16)[None]).float().square().mean().backward()
    return counters["stats"]["calls_captured"]


def compile_all(folder: Path, degrees: dict[str, int]) -> None:
    found = {mode: compiled_operations(mode, degrees) for mode in MODES}
    if dist.get_rank() == 0:
        (folder / "operations.json").write_text(json.dumps(found))


@pytest.mark.long
@pytest.mark.parametrize(
    "degrees", [{"dp_shard": 2, "ep": 2}, {"dp_shard": 1, "tp": 2}], ids=["ep2", "tp2"]
)
def test_checkpointed_blocks_are_compiled(degrees: dict[str, int], tmp_path: Path) -> None:
    on_ranks(2, compile_all, tmp_path, degrees)
    found = json.loads((tmp_path / "operations.json").read_text())
    assert found["full"] == found["none"] > 40
    # Per op, attention's kernel runs eager, and so do experts.
    assert found["selective"] >= found["none"] - 10
