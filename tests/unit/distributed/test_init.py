from __future__ import annotations

import pytest
import torch
import torch.nn as nn

from torchtitan.distributed.init import initialize_weights
from torchtitan.distributed.tying import preserve_tying
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


def test_tied_weights_stay_tied() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
        model["b"].weight = model["a"].weight
    with preserve_tying(model):
        model.to_empty(device="cpu")
    assert model["b"].weight is model["a"].weight
    assert model["b"].bias is not model["a"].bias
