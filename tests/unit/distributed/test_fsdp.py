"""What layers share is sharded once, or refused with its names."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

from torchtitan.config import JobConfig
from torchtitan.distributed.fsdp import (
    _placement_over,
    apply_fsdp,
    fsdp_modules,
    mixed_precision,
    set_last_micro_batch,
)
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.errors import ConfigError
from torchtitan.planning.trace import fake_world


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings, self.norm, self.output = nn.Embedding(8, 4), None, nn.Linear(4, 8)
        self.layers = nn.ModuleDict({"0": Block(), "1": Block(), "2": Block()})


def sharded(model: Model, config: JobConfig | None = None) -> None:
    with fake_world(2, 0):
        mesh = init_device_mesh("cpu", (1, 2, 1), mesh_dim_names=("dp", "dp_shard_cp", "tp"))
        apply_fsdp(model, mesh["dp"], config or JobConfig())


@pytest.mark.parametrize("reduce", ["float32", "bfloat16"])
def test_gradients_are_reduced_in_the_type_asked_for(reduce: str) -> None:
    with torch.device("meta"):
        model = Model()
    config = JobConfig()
    config.training.mixed_precision_param = "bfloat16"
    config.training.mixed_precision_reduce = reduce
    sharded(model, config)
    policies = [module._get_fsdp_state()._mp_policy for module in fsdp_modules(model)]
    types = {(policy.param_dtype, policy.reduce_dtype) for policy in policies}
    assert types == {(torch.bfloat16, getattr(torch, reduce))}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("fsdp", [True, False])
def test_autocast_is_for_half_precision_without_fsdp(fsdp: bool, dtype: str) -> None:
    """With it too, what a model computes in float32 in its layers would be rounded."""
    config = JobConfig()
    config.training.mixed_precision_param = dtype
    with mixed_precision(fsdp, config, torch.device("cpu")):
        assert torch.is_autocast_enabled("cpu") == (dtype == "bfloat16" and not fsdp)


@pytest.mark.parametrize("policy", ["default", "always", "never"])
@pytest.mark.parametrize("stages", [1, 2])
def test_a_pipeline_gathers_a_layer_once_for_all_micro_batches(policy: str, stages: int) -> None:
    with torch.device("meta"):
        model = Model()
    config = JobConfig()
    config.parallelism.fsdp_reshard_after_forward = policy
    config.parallelism.pipeline_parallel_degree = stages
    sharded(model, config)
    reshards = {
        module._get_fsdp_state()._fsdp_param_group.post_forward_mesh_info is not None
        for module in model.layers.values()
    }
    assert reshards == {policy == "always" or (policy == "default" and stages == 1)}


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((6, 8), None),
        ((8, 8, 8), None),  # between experts
        ((6, 8, 6), Shard(1)),
        ((6, 6, 8), Shard(2)),
        ((6, 6, 6), None),  # FSDP cuts other dimensions only evenly
    ],
)
def test_experts_are_cut_as_evenly_as_possible(shape: tuple[int, ...], expected: object) -> None:
    with fake_world(4, 0):
        mesh = init_device_mesh("cpu", (4,))
        assert _placement_over(mesh)(nn.Parameter(torch.empty(shape))) == expected


@pytest.mark.parametrize(
    ("experts", "etp_dim", "expected"),
    # Of 8, each of the 4 ranks of `ep` has 2, which 4 ranks share; of 16 over 8 ranks too.
    [(16, 1, None), (8, 1, Shard(2)), (16, 0, Shard(1))],
)
def test_experts_that_are_cut_already_are_cut_elsewhere(
    experts: int, etp_dim: int, expected: object
) -> None:
    with fake_world(32, 0):
        mesh = init_device_mesh("cpu", (4, 4, 2), mesh_dim_names=("expert_dp", "ep", "etp"))
        weight = distribute_tensor(
            torch.empty(experts, 8, 8),
            mesh["ep", "etp"],
            [Shard(0), Shard(etp_dim)],
            src_data_rank=None,
        )
        assert _placement_over(mesh["expert_dp"])(nn.Parameter(weight)) == expected


def test_replicas_sum_gradients_after_the_last_micro_batch_alone() -> None:
    with torch.device("meta"):
        model = Model()
    with fake_world(4, 0):
        names = ("dp", "dp_replicate", "dp_shard_cp")
        mesh = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=names)
        apply_fsdp(model, mesh["dp"], JobConfig())
    modules = fsdp_modules(model)
    groups = [group for m in modules if (group := m._get_fsdp_state()._fsdp_param_group)]
    assert groups
    for last in (False, True):
        set_last_micro_batch(modules, last)
        assert {group.all_reduce_grads for group in groups} == {last}


class Scaled(nn.Embedding):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens) * self.weight.mean()


@pytest.mark.parametrize("kind", [nn.Embedding, Scaled])
def test_the_backward_pass_gathers_an_embedding_unless_it_is_a_table(kind: type) -> None:
    with torch.device("meta"):
        model = Model()
        model.tok_embeddings = kind(8, 4)
    sharded(model)
    group = model.tok_embeddings._get_fsdp_state()._fsdp_param_group
    assert group.unshard_in_backward == (kind is Scaled)


def test_a_module_of_several_layers_is_a_group_of_its_own() -> None:
    with torch.device("meta"):
        model = Model()
    model.layers["2"].a = model.layers["0"].a
    sharded(model)
    assert isinstance(model.layers["0"].a, FSDPModule)
    assert not isinstance(model.layers["1"].a, FSDPModule)
    assert model.layers["2"].a.weight is model.layers["0"].a.weight


def test_a_layer_may_be_in_two_places() -> None:
    with torch.device("meta"):
        model = Model()
    model.layers["2"] = model.layers["0"]
    sharded(model)
    assert isinstance(model.layers["0"], FSDPModule)


def test_a_parameter_of_two_modules_is_refused_with_both_names() -> None:
    with torch.device("meta"):
        model = Model()
    model.layers["2"].a.weight = model.layers["0"].b.weight
    with pytest.raises(ConfigError, match=r"layers\.0\.b\.weight and layers\.2\.a\.weight are one"):
        sharded(model)


def test_embedding_norm_and_output_may_have_other_names() -> None:
    with torch.device("meta"):
        model = Model()
        model.patches = nn.Linear(4, 4)
    del model.tok_embeddings, model.norm, model.output
    sharded(model)
    assert isinstance(model.layers["0"], FSDPModule)
    assert isinstance(model, FSDPModule)
    assert not isinstance(model.patches, FSDPModule)  # its parameters are the root's


class Embeddings(nn.Module):
    """Of several codebooks: it has no `weight`."""

    def __init__(self) -> None:
        super().__init__()
        self.books = nn.ModuleList(nn.Embedding(8, 4) for _ in range(2))


def test_there_may_be_several_embeddings_and_heads() -> None:
    with torch.device("meta"):
        model = Model()
        model.tok_embeddings = Embeddings()
        model.output = nn.ModuleList(nn.Linear(4, 8) for _ in range(2))
    sharded(model)
    assert isinstance(model.tok_embeddings, FSDPModule)
    assert not isinstance(model.output, FSDPModule)  # never called itself: the root's


def test_a_weight_of_one_of_several_heads_that_is_an_embedding_is_the_root_s() -> None:
    with torch.device("meta"):
        model = Model()
        model.tok_embeddings = Embeddings()
    model.output.weight = model.tok_embeddings.books[0].weight
    sharded(model)
    assert not isinstance(model.tok_embeddings, FSDPModule)


def test_what_tensor_parallelism_replicates_may_have_three_dimensions() -> None:
    """Such as a convolution, whose channels the ranks cannot share evenly."""
    with torch.device("meta"):
        model = Model()
        model.tok_embeddings, model.layers["0"].a = nn.Conv1d(1, 3, 2), nn.Conv1d(1, 3, 2)
    with fake_world(4, 0):
        dims = ParallelDims(dp_shard=2, tp=2, world_size=4)
        plan = {"tok_embeddings": SequenceParallel(), "layers.0.a": SequenceParallel()}
        parallelize_module(model, dims.world_mesh["tp"], plan)
        apply_fsdp(model, dims.world_mesh["dp"], JobConfig())
        weights = [model.tok_embeddings.weight, model.layers["0"].a.weight]
    assert [list(weight.to_local().shape) for weight in weights] == [[3, 1, 1]] * 2


def test_a_parameter_without_dimensions_is_refused_with_its_name() -> None:
    with torch.device("meta"):
        model = Model()
        model.layers["1"].scale = nn.Parameter(torch.empty(()))
    with pytest.raises(ConfigError, match=r"layers\.1\.scale has no dimensions"):
        sharded(model)


def test_a_parameter_without_elements_is_refused_with_its_name() -> None:
    with torch.device("meta"):
        model = Model()
        model.layers["1"].rows = nn.Parameter(torch.empty(0, 4))
    with pytest.raises(ConfigError, match=r"layers\.1\.rows has no elements"):
        sharded(model)


def test_a_parameter_that_tensor_parallelism_leaves_to_some_ranks_is_refused_on_all() -> None:
    """As a factor of LoRA whose rank is below the degree; PyTorch fails in the backward pass."""
    for rank in (0, 1):
        with torch.device("meta"):
            model = Model()
        with fake_world(2, rank):
            mesh = init_device_mesh("cpu", (1, 1, 2), mesh_dim_names=("dp", "dp_shard_cp", "tp"))
            down = distribute_tensor(torch.empty(1, 4), mesh["tp"], [Shard(0)])
            model.layers["1"].down = nn.Parameter(down)
            with pytest.raises(ConfigError, match=r"layers\.1\.down \[1, 4\].*over 2 ranks"):
                apply_fsdp(model, mesh["dp"], JobConfig())


def test_trained_parameters_of_two_dtypes_are_refused_with_a_name_of_each() -> None:
    with torch.device("meta"):
        model = Model()
        model.layers["1"].scale = nn.Parameter(torch.empty(4, dtype=torch.bfloat16))
    with pytest.raises(ConfigError, match=r"is float32, layers\.1\.scale is bfloat16, but data"):
        sharded(model)
