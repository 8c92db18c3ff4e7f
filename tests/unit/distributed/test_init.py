from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan.distributed.init import SeededInit, initialize_weights
from torchtitan.distributed.tying import preserve_tying
from torchtitan.planning.trace import fake_world
from torchtitan.protocols.model import ModelProtocol


class Model(ModelProtocol):
    def __init__(self, layers: list[int], raw: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.layers = nn.ModuleDict({str(i): nn.Linear(4, 4) for i in layers})
        if raw:
            self.scale = nn.Parameter(torch.empty(4))

    def init_weights(self) -> None:
        for layer in self.layers.values():
            nn.init.trunc_normal_(layer.weight, std=1.0, a=-1.5, b=1.5)
            layer.bias.data.normal_()


def initialized(layers: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        model = Model(layers)
    initialize_weights(model, seed, torch.device("cpu"))
    return model.state_dict()


def test_weights_depend_on_the_name_and_not_on_the_other_layers() -> None:
    """As on a pipeline stage, which has some of the layers."""
    whole, part = initialized([0, 1, 2, 3]), initialized([2, 3])
    for name, value in part.items():
        assert torch.equal(value, whole[name]), name
    assert not torch.equal(whole["layers.2.weight"], whole["layers.3.weight"])
    assert not torch.equal(whole["layers.2.bias"], whole["layers.3.bias"])


class Orthogonal(Model):
    def init_weights(self) -> None:
        for layer in self.layers.values():
            nn.init.orthogonal_(layer.weight)
            nn.init.normal_(layer.bias)


def test_orthogonal_weights_too() -> None:
    """They are made from a temporary, which is no parameter."""
    of_whole, of_part = Orthogonal([0, 1]), Orthogonal([1])
    for model in (of_whole, of_part):
        initialize_weights(model, 0, torch.device("cpu"))
    one, other = of_part.layers["1"].weight, of_whole.layers["1"].weight
    assert torch.equal(one, other)
    assert not torch.equal(other, of_whole.layers["0"].weight)


def test_weights_depend_on_the_seed() -> None:
    one, other = initialized([0], seed=1), initialized([0], seed=2)
    assert not torch.equal(one["layers.0.weight"], other["layers.0.weight"])


def test_modules_the_model_leaves_out_keep_pytorchs_defaults() -> None:
    embedding = initialized([0])["embedding.weight"]
    assert 0.3 < embedding.std() < 2


def test_an_unset_parameter_is_an_error_that_names_it() -> None:
    with torch.device("meta"):
        model = Model([0], raw=True)
    with pytest.raises(RuntimeError, match=r"init_weights\(\) leaves 1 tensors unset: scale"):
        initialize_weights(model, 0, torch.device("cpu"))


class Devices(TorchDispatchMode):
    """Notes where each random operation runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.seen.add(args[0].device.type)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("drawn_on", ["cuda", "cpu"])
def test_parameters_on_the_host_are_drawn_for_on_the_device(drawn_on: str) -> None:
    """Where the numbers are those of a run without offloading. Fake tensors: CI has no GPU."""
    with FakeTensorMode():
        model, devices = Model([0]), Devices()
        with devices, SeededInit(model, 0, torch.device(drawn_on)), torch.no_grad():
            model.embedding.weight.normal_()
            model.layers["0"].bias.normal_()
        assert devices.seen == {drawn_on}
        assert {param.device.type for param in model.parameters()} == {"cpu"}


class Buffers(ModelProtocol):
    """Buffers that are not floating point, as masks and complex rotations are."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names
        self.register_buffer("mask", torch.ones(4, 4, dtype=torch.bool).tril())
        self.register_buffer("counts", torch.zeros(4, dtype=torch.int64))
        self.register_buffer("rotation", torch.ones(4, dtype=torch.complex64))
        self.register_buffer("replaced", torch.zeros(4, dtype=torch.int32))

    def init_weights(self) -> None:
        if "mask" in self.names:
            self.mask.copy_(torch.ones(4, 4, dtype=torch.bool).tril())
        if "counts" in self.names:
            torch.arange(4, out=self.counts)
        if "rotation" in self.names:
            self.rotation[:] = 1j
        if "replaced" in self.names:
            self.replaced = torch.arange(4, dtype=torch.int32)


NAMES = ["mask", "counts", "rotation", "replaced"]


@pytest.mark.parametrize("left_out", NAMES)
def test_an_unset_buffer_of_any_dtype_is_an_error(left_out: str) -> None:
    with torch.device("meta"):
        model = Buffers([name for name in NAMES if name != left_out])
    with pytest.raises(RuntimeError, match=f"leaves 1 tensors unset: {left_out}"):
        initialize_weights(model, 0, torch.device("cpu"))


def test_buffers_of_any_dtype_can_be_set() -> None:
    with torch.device("meta"):
        model = Buffers(NAMES)
    initialize_weights(model, 0, torch.device("cpu"))
    assert model.mask.sum() == 10 and model.rotation[3] == 1j
    assert model.counts.tolist() == model.replaced.tolist() == [0, 1, 2, 3]


class Computed(ModelProtocol):
    """Parameters that begin as computed numbers, as those of state-space models do."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = nn.Parameter(torch.empty(5))
        self.table = nn.Parameter(torch.empty(4, 3))

    def init_weights(self) -> None:
        self.rates.copy_(torch.arange(1, 6).log())
        self.table.data.copy_(torch.arange(3))


@pytest.mark.parametrize("rank", [0, 1])
def test_computed_numbers_may_be_copied_into_sharded_parameters(rank: int) -> None:
    with fake_world(2, rank):
        with torch.device("meta"):
            model = Computed()
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        initialize_weights(model, 0, torch.device("cpu"))
        expected = torch.arange(1, 6).log().chunk(2)[rank]
        assert torch.equal(model.rates.to_local(), expected)
        assert model.table.to_local().tolist() == [[0, 1, 2]] * 2


def rows_of_halves(weight: torch.Tensor) -> None:
    for half in weight.chunk(2):
        nn.init.normal_(half)
    weight[0] = 1
    weight[2:4].copy_(torch.arange(3))


def lower_triangle(weight: torch.Tensor) -> None:
    nn.init.normal_(weight, generator=torch.Generator().manual_seed(1)).tril_()
    weight.masked_fill_(torch.eye(5, 3).bool(), 2.0).t()[1].mul_(3)


class InParts(ModelProtocol):
    def __init__(self, initialize: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.initialize = initialize
        self.weight = nn.Parameter(torch.empty(5, 3))
        self.padded = nn.Embedding(4, 3, padding_idx=1)

    def init_weights(self) -> None:
        self.initialize(self.weight)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "initialize",
    [rows_of_halves, lower_triangle, partial(nn.init.sparse_, sparsity=0.3), nn.init.eye_],
)
def test_parts_of_sharded_parameters_are_set_as_on_one_process(
    initialize: Callable[[torch.Tensor], Any], rank: int
) -> None:
    """DTensor fails in some of these operations, and in others changes a copy."""
    with torch.device("meta"):
        whole, model = InParts(initialize), InParts(initialize)
    initialize_weights(whole, 0, torch.device("cpu"))
    assert not whole.padded.weight[1].any()
    with fake_world(2, rank):
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        initialize_weights(model, 0, torch.device("cpu"))
    for name, param in model.named_parameters():
        expected = whole.get_parameter(name).chunk(2)[rank]
        assert torch.equal(param.to_local(), expected), name


class Weight(ModelProtocol):
    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns))

    def init_weights(self) -> None:
        nn.init.normal_(self.weight)


@pytest.mark.parametrize("rank", range(0, 8, 3))
@pytest.mark.parametrize(
    ("shape", "placements"),
    [
        ((16, 3), [_StridedShard(0, split_factor=2), Shard(0)]),
        ((14, 3), [_StridedShard(0, split_factor=2), Shard(0)]),  # a rank has fewer rows
        ((5, 7), [Shard(0), Shard(1)]),
        ((3, 4), [Replicate(), Shard(0)]),
        ((2, 4), [Shard(0), Replicate()]),  # ranks 4 and on have nothing
    ],
)
def test_a_rank_keeps_its_shard_and_makes_no_other(
    rank: int, shape: tuple[int, int], placements: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta"):
        model = Weight(*shape)
    initialize_weights(model, 0, torch.device("cpu"))
    with fake_world(8, rank):
        mesh = init_device_mesh("cpu", (4, 2))
        whole = model.weight.detach()
        expected = distribute_tensor(whole, mesh, placements, src_data_rank=None)
        monkeypatch.setattr("torchtitan.distributed.init.distribute_tensor", None)
        empty = torch.empty(shape, device="meta")
        model.weight = nn.Parameter(distribute_tensor(empty, mesh, placements, src_data_rank=None))
        initialize_weights(model, 0, torch.device("cpu"))
        assert torch.equal(model.weight.to_local(), expected.to_local())


def test_tied_weights_stay_tied() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
        model["b"].weight = model["a"].weight
        model["c"] = nn.ParameterDict({"table": model["a"].weight})
    with preserve_tying(model):
        model.to_empty(device="cpu")
        first = model["a"].weight
    assert first is model["a"].weight is model["b"].weight is model["c"].table
    assert model["c"].keys() == {"table"}
    assert model["b"].bias is not model["a"].bias


class Spectral(ModelProtocol):
    def __init__(self) -> None:
        super().__init__()
        self.linear = spectral_norm(nn.Linear(4, 4, bias=False))

    def init_weights(self) -> None:
        part = self.linear.parametrizations.weight
        for tensor in (part.original, part[0]._u, part[0]._v):
            nn.init.normal_(tensor)


def test_a_weight_that_is_computed_from_buffers_is_set_as_they_are() -> None:
    """`reset_parameters` of nn.Linear would compute the weight, of a sharded and a plain tensor."""
    with fake_world(2, rank=0):
        with torch.device("meta"):
            model = Spectral()
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        initialize_weights(model, 0, torch.device("cpu"))
        assert model.linear.parametrizations.weight.original.to_local().shape == (2, 4)


class ZeroBranch(nn.Module):
    """As on a single device, where `__init__` ends with it, what it sets in its parts remains."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.linear.weight)


class OwnDefaults(ModelProtocol):
    def __init__(self) -> None:
        super().__init__()
        self.branch = ZeroBranch()
        self.attention = nn.MultiheadAttention(4, 2)

    def init_weights(self) -> None:
        pass


def test_defaults_of_a_module_override_those_of_its_parts() -> None:
    """Its parts were reset after it. And PyTorch's attention, with another method, was refused."""
    with torch.device("meta"):
        model = OwnDefaults()
    initialize_weights(model, 0, torch.device("cpu"))
    assert not model.branch.linear.weight.any() and model.branch.linear.bias.any()
    assert model.attention.in_proj_weight.any() and not model.attention.out_proj.bias.any()
