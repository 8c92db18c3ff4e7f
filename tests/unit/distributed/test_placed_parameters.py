"""Parameters that a layout of ours places are not taken for copies that nobody keeps equal."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn as nn
from torch.distributed.tensor import Shard, distribute_tensor

from torchtitan.config import load_config
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.unequal_gradients import _DIMS, _dims_of
from torchtitan.models import qwen3
from torchtitan.runtime.fake_world import fake_world


@pytest.mark.parametrize(
    "degrees",
    [
        {"dp_replicate": 2, "dp_shard": 2, "tp": 2, "ep": 2},
        {"dp_shard": 2, "cp": 2, "tp": 2, "ep": 4, "etp": 2},
        {"dp_replicate": 2, "dp_shard": 2, "cp": 2},
        {"dp_replicate": 4},
    ],
)
def test_every_parameter_has_a_placement_in_each_dimension(degrees: dict[str, int]) -> None:
    world_size = math.prod(degrees[name] for name in degrees if name not in ("ep", "etp"))
    spec, config = qwen3.get_train_spec("debugmodel_moe"), load_config(["--model.name=qwen3"])
    with fake_world(world_size, rank=0):
        dims = ParallelDims(**degrees, world_size=world_size)
        model = spec.parallelize(spec.meta_model(spec.model_args), dims.world_mesh, dims, config)
        expected = {dim for dim in _DIMS if getattr(dims, dim) > 1}
        for name, param in model.named_parameters():
            assert expected <= _dims_of(param), name


@pytest.mark.parametrize(
    ("mesh", "expected"),
    [
        ("tp", {"tp"}),
        ("dp", {"dp_replicate", "dp_shard"}),
        ("dp_shard_cp", {"dp_shard", "cp"}),
        ("dp_cp", {"dp_replicate", "dp_shard", "cp"}),
    ],
)
def test_a_mesh_has_the_dimensions_of_which_it_is_made(mesh: str, expected: set[str]) -> None:
    """An author may shard over any of them."""
    with fake_world(16, rank=0):
        degrees = dict.fromkeys(_DIMS, 2)
        world_mesh = ParallelDims(**degrees, world_size=16).world_mesh
        weight = distribute_tensor(torch.empty(16, 2), world_mesh[mesh], [Shard(0)])
        assert _dims_of(nn.Parameter(weight)) == expected
