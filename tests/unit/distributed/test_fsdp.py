"""What layers share is sharded once, or refused with its names."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from torchtitan.config import JobConfig
from torchtitan.distributed.fsdp import apply_fsdp
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


def sharded(model: Model) -> None:
    with fake_world(2, 0):
        mesh = init_device_mesh("cpu", (1, 2, 1), mesh_dim_names=("dp", "dp_shard_cp", "tp"))
        apply_fsdp(model, mesh["dp"], JobConfig())


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
