"""Experts that are dispatched; what travels is in tests/distributed/test_row_exchange.py."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import Shard

from torchtitan.config import JobConfig
from torchtitan.distributed import expert_parallel
from torchtitan.distributed.expert_parallel import RowExchange, apply_expert_parallel
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.pipeline_stage import _asked_for_shapes
from torchtitan.errors import ConfigError
from torchtitan.models import deepseek_v3, qwen3
from torchtitan.models.common.moe import MoE, MoEArgs
from torchtitan.models.qwen3.model import Qwen3Model
from torchtitan.runtime.fake_world import fake_world


def test_a_pass_that_asks_for_shapes_sends_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sent(Exception):
        pass

    def send(*args: object) -> None:
        raise Sent

    monkeypatch.setattr(expert_parallel, "RowExchange", send)
    with fake_world(2, rank=0):
        model = nn.ModuleDict({"moe": MoE(16, MoEArgs(num_experts=4, top_k=2, hidden_dim=16))})
        model["moe"].init_weights(0.02, 0.02)
        apply_expert_parallel(model, ParallelDims(dp_shard=2, ep=2, world_size=2))
        x = torch.zeros(2, 8, 16, requires_grad=True)
        with _asked_for_shapes(model):
            assert not model.training
            out = model["moe"](x)
        assert out.shape == x.shape
        assert model.training
        with pytest.raises(Sent):
            model["moe"](x)


@pytest.mark.parametrize(
    ("degrees", "shape"),
    [
        ({"dp_shard": 2}, None),
        ({"tp": 2, "ep": 2}, None),
        ({"tp": 2, "etp": 2}, None),
        ({"tp": 2}, {"expert_dp": 2}),
        ({"cp": 2, "ep": 2}, {"expert_dp": 1}),
        ({"dp_shard": 4, "ep": 2}, {"expert_dp": 2}),
        ({"dp_replicate": 2, "dp_shard": 2, "ep": 2}, {"dp_replicate": 2, "expert_dp": 1}),
        ({"dp_replicate": 2, "tp": 2, "etp": 2}, {"dp_replicate": 2, "expert_dp": 1}),
    ],
)
def test_experts_are_sharded_over_the_ranks_that_have_the_same(
    degrees: dict[str, int], shape: dict[str, int] | None
) -> None:
    """And replicated over all replicas: else nobody would sum their gradients."""
    world_size = math.prod(degrees[name] for name in degrees if name not in ("ep", "etp"))
    with fake_world(world_size, rank=0):
        moe = MoE(16, MoEArgs(num_experts=4, top_k=2, hidden_dim=16))
        meshes = apply_expert_parallel(moe, ParallelDims(**degrees, world_size=world_size))
        found = [
            dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True)) for mesh in meshes.values()
        ]
    assert found == ([] if shape is None else [shape])


def test_a_plan_assumes_that_each_rank_receives_as_many_rows_as_it_sends() -> None:
    with fake_world(4, rank=0):
        mesh = ParallelDims(dp_shard=2, tp=2, ep=2, etp=2, world_size=4).expert_mesh
        groups = [mesh[name].get_group() for name in ("ep", "etp")]
        with FakeTensorMode():
            exchange = RowExchange(torch.tensor([2, 3, 1, 6]), 12, *groups)
            arrived = exchange.send(torch.zeros(12, 16))
            back = exchange.send_back(arrived)
    assert arrived.shape == (24, 16)  # those of both ranks of `etp`
    assert back.shape == (12, 16)


@pytest.mark.parametrize(
    ("experts", "degrees", "problem"),
    [
        (
            nn.ParameterDict({"up": torch.empty(4, 16, 16)}),
            {"tp": 2, "etp": 2},
            r"up of ParameterDict .* parallelism\.expert_tensor_parallel_degree .* w1, w2, w3",
        ),
        (
            nn.ParameterDict({"scale": torch.empty(16)}),
            {"dp_shard": 2, "ep": 2},
            r"scale of ParameterDict \[16\] cannot be given .*\[4, \.\.\.\]",
        ),
        (
            nn.ModuleList([nn.Linear(16, 4)]),
            {"dp_shard": 2, "ep": 2},
            r"0\.weight of ModuleList .* must be the module's own",
        ),
    ],
)
def test_parameters_that_ranks_cannot_share_are_named(
    experts: nn.Module, degrees: dict[str, Any], problem: str
) -> None:
    args = MoEArgs(num_experts=4, top_k=2, hidden_dim=16)
    with fake_world(2, rank=0), pytest.raises(ConfigError, match=problem):
        apply_expert_parallel(MoE(16, args, experts), ParallelDims(world_size=2, **degrees))


def test_shared_experts_are_split() -> None:
    spec = qwen3.get_train_spec("debugmodel_moe")
    args = replace(spec.model_args, moe=replace(spec.model_args.moe, num_shared_experts=1))
    with fake_world(2, rank=0):
        dims, model = ParallelDims(tp=2, world_size=2), Qwen3Model(args)
        spec.parallelize_fn(model, dims.world_mesh, dims, JobConfig())
    shared = model.layers["0"].moe.shared_experts
    weights = [shared.get_parameter(f"{name}.weight") for name in ("w1", "w2", "w3")]
    assert [weight.placements[-1] for weight in weights] == [Shard(0), Shard(1), Shard(0)]


def test_ranks_whose_stages_have_no_experts_make_the_groups_of_experts_too() -> None:
    """Else the groups that are made later would wait for each other's ranks in vain."""
    spec, config = deepseek_v3.get_train_spec("debugmodel"), JobConfig()
    args = replace(spec.model_args, n_dense_layers=2)
    config.parallelism.pipeline_parallel_degree = 2
    made = []
    for rank in (0, 3):
        with fake_world(4, rank):
            dims = ParallelDims(pp=2, tp=2, world_size=4)
            layout = dims.world_mesh, dims, config
            spec.pipeline_fn(spec.meta_model(args), *layout, spec.parallelize, len)
            made.append(sorted(dist.distributed_c10d._world.pg_names.values()))
    assert made[0] and len(made[0]) == len(made[1])
