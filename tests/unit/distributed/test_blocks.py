"""Which modules are treated one by one: the layers, and the blocks of other stacks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
from tiny_models import TINY, tiny_spec
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import RowwiseParallel

from torchtitan.config import JobConfig
from torchtitan.distributed.activation_checkpoint import apply_ac, is_checkpointed
from torchtitan.distributed.blocks import blocks_of
from torchtitan.distributed.compile import apply_compile
from torchtitan.distributed.fsdp import apply_fsdp
from torchtitan.distributed.tensor_parallel import apply_tensor_parallel
from torchtitan.errors import ConfigError
from torchtitan.runtime.fake_world import fake_world


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x)


class Model(nn.Module):
    """An encoder beside the layers, and what looks like one."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"0": Block(), "1": Block()})
        self.tower = nn.Module()
        self.tower.blocks = nn.Sequential(Block(), Block())
        self.layers = nn.ModuleDict({"0": nn.ModuleList([Block(), Block()]), "1": Block()})
        self.heads = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.towers = nn.ModuleDict({"audio": Block(), "text": nn.Sequential(nn.Linear(4, 4))})


NAMES = ["layers.0", "layers.1", "encoder.0", "encoder.1", "tower.blocks.0", "tower.blocks.1"]


def test_blocks_of_other_stacks_are_found() -> None:
    assert list(blocks_of(Model())) == NAMES


def test_layers_that_are_kept_elsewhere_are_blocks_once() -> None:
    class Kept(nn.Module):
        layers = property(lambda self: self.transformer.h)

        def __init__(self) -> None:
            super().__init__()
            self.transformer = nn.ModuleDict({"h": nn.ModuleDict({"0": Block(), "1": Block()})})

    assert list(blocks_of(Kept())) == ["layers.0", "layers.1"]


def test_a_block_that_shares_a_parameter_is_left_to_the_model() -> None:
    model = Model()
    model.encoder["1"].linear.weight = model.heads[0].weight
    assert list(blocks_of(model)) == [name for name in NAMES if name != "encoder.1"]


class Parts(nn.Module):
    """Its parts are called from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Block(), nn.Sequential(nn.Linear(4, 4))


@pytest.mark.parametrize(
    "member",
    [
        lambda: nn.ModuleList([Block(), nn.Sequential(nn.Linear(4, 4))]),
        lambda: nn.ModuleDict({"attention": Block(), "mlp": nn.Sequential(nn.Linear(4, 4))}),
        Parts,
    ],
)
def test_what_has_no_forward_is_no_block_and_trains(member: Callable[[], nn.Module]) -> None:
    model = Model()
    model.layers["0"] = Block()
    model.tower.blocks = nn.ModuleList([member(), member()])
    assert list(blocks_of(model)) == NAMES[:4]
    with fake_world(2, 0):
        mesh = init_device_mesh("cpu", (1, 2, 1), mesh_dim_names=("dp", "dp_shard_cp", "tp"))
        apply_fsdp(model, mesh["dp"], JobConfig())
    assert not any(isinstance(module, FSDPModule) for module in model.tower.modules())


@pytest.mark.parametrize("name", TINY)
def test_text_models_have_their_layers_alone(name: str) -> None:
    model = tiny_spec(name).meta_model(TINY[name])
    assert list(blocks_of(model)) == [f"layers.{n}" for n in model.layers]
    assert list(blocks_of(model).values()) == list(model.layers.values())


def test_every_block_is_gathered_checkpointed_and_compiled() -> None:
    model = Model()
    model.layers["0"] = Block()
    config = JobConfig()
    config.activation_checkpoint.mode = "full"
    apply_ac(model, config)
    assert all(is_checkpointed(block) for block in blocks_of(model).values())
    before = {name: block.forward for name, block in blocks_of(model).items()}
    config.compile.enable = True
    apply_compile(model, config)
    assert all(block.forward != before[name] for name, block in blocks_of(model).items())
    with fake_world(2, 0):
        mesh = init_device_mesh("cpu", (1, 2, 1), mesh_dim_names=("dp", "dp_shard_cp", "tp"))
        apply_fsdp(model, mesh["dp"], config)
    assert all(isinstance(block, FSDPModule) for block in blocks_of(model).values())
    assert not isinstance(model.heads[0], FSDPModule)


class WithOtherBlocks(Model):
    """`towers` is no stack of blocks that are alike, and `single` is none at all."""

    other_blocks = ("single", "towers", "tower.absent", "gone.inside")

    def __init__(self) -> None:
        super().__init__()
        self.layers["0"] = Block()
        self.single = Nested()
        self.tower.absent = self.gone = None  # as in stages of a pipeline that are without


class Nested(Block):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([Block(), Block()])


OTHERS = ["single", "towers.audio", "towers.text"]


def test_a_model_names_other_blocks_which_are_treated_as_layers_are() -> None:
    model = WithOtherBlocks()
    assert list(blocks_of(model)) == NAMES + OTHERS
    config = JobConfig()
    config.activation_checkpoint.mode = "full"
    apply_ac(model, config)
    assert all(is_checkpointed(blocks_of(model)[name]) for name in OTHERS)
    with fake_world(2, 0):
        names = ("dp", "dp_shard_cp", "tp")
        mesh = init_device_mesh("cpu", (1, 1, 2), mesh_dim_names=names)
        config.parallelism.disable_sequence_parallel = True
        plan = {"linear": RowwiseParallel(output_layouts=Shard(1))}
        plan_of = lambda block: plan if hasattr(block, "linear") else {}  # noqa: E731
        apply_tensor_parallel(model, mesh["tp"], config, plan_of)
        assert model.single.linear.weight.placements == (Shard(1),)
        # The sequence is whole between other blocks too.
        assert model.single.linear(torch.ones(1, 2, 2)).shape == (1, 2, 4)
        mesh = init_device_mesh("cpu", (1, 2, 1), mesh_dim_names=names)
        model = WithOtherBlocks()
        apply_fsdp(model, mesh["dp"], JobConfig())
    assert all(isinstance(blocks_of(model)[name], FSDPModule) for name in OTHERS)
    assert not any(isinstance(block, FSDPModule) for block in model.single.inner)


def test_a_name_that_no_module_has_is_an_error() -> None:
    model = WithOtherBlocks()
    model.other_blocks = ("sinlge",)
    with pytest.raises(AttributeError, match="sinlge"):
        blocks_of(model)


class Broken(Block):
    """The compiler cannot make one graph of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        torch._dynamo.graph_break()
        return x


def test_a_layer_must_be_one_graph_but_no_other_block() -> None:
    model = Model()
    model.layers = nn.ModuleDict({"0": Broken()})
    model.encoder = nn.ModuleList([Broken(), Broken()])
    config = JobConfig()
    config.compile.enable, config.compile.backend = True, "eager"
    apply_compile(model, config)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        model.layers["0"](torch.ones(1, 4))
    model.encoder[0](torch.ones(1, 4))


class LeftOut(Broken):
    forward = torch.compiler.disable(Broken.forward)


def test_a_layer_may_leave_out_a_module_that_cannot_be_compiled() -> None:
    model = Model()
    model.layers = nn.ModuleDict({"0": nn.Sequential(LeftOut())})
    config = JobConfig()
    config.compile.enable, config.compile.backend = True, "eager"
    apply_compile(model, config)
    model.layers["0"](torch.ones(1, 4))


@pytest.mark.parametrize("layers", [None, nn.ModuleList([Block()])])
def test_a_model_without_a_dict_of_layers_is_a_mistake_that_is_named(layers):
    model = nn.Module()
    if layers is not None:
        model.layers = layers
    with pytest.raises(ConfigError, match=rf"Module\.layers is {type(layers).__name__}, not"):
        apply_ac(model, JobConfig())
