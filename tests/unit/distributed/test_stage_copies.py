"""Weights that several stages of a pipeline have, on one process."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

from torchtitan.components.checkpoint.model_tensors import first_names, tied_embeddings
from torchtitan.components.optimizer import build_optimizer
from torchtitan.config import JobConfig
from torchtitan.config.optimizer import ParamRule
from torchtitan.distributed.init import initialize_weights
from torchtitan.distributed.pipeline_split import split_model
from torchtitan.distributed.stage_copies import (
    StageCopies,
    copies_of,
    sharing_of,
    with_absent_modules,
)
from torchtitan.protocols import ModelProtocol

CPU = torch.device("cpu")


class Tied(ModelProtocol):
    """Its output layer has a bias, which is not shared, and its initialization comes last."""

    def __init__(self, output_first: bool = False) -> None:
        super().__init__()
        if output_first:
            self.output = nn.Linear(8, 16)
        self.tok_embeddings = nn.Embedding(16, 8)
        self.layers = nn.ModuleDict({str(i): nn.Linear(8, 8) for i in range(3)})
        if not output_first:
            self.output = nn.Linear(8, 16)
        self.output.weight = self.tok_embeddings.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.tok_embeddings(x) if self.tok_embeddings is not None else x
        for layer in self.layers.values():
            x = layer(x)
        return self.output(x) if self.output is not None else x

    def init_weights(self) -> None:
        if self.tok_embeddings is not None:
            nn.init.normal_(self.tok_embeddings.weight)
        if self.output is not None:
            self.output.weight.mul_(0.5)


def stages(numbers: list[int], **options: bool) -> list[Tied]:
    config = JobConfig()
    config.parallelism.pipeline_parallel_degree = 3
    with torch.device("meta"):
        model = Tied(**options)
    parts = split_model(model, config, numbers, ("tok_embeddings",), ("output",))
    for part in parts:
        initialize_weights(part, 0, CPU)
    return parts


@pytest.mark.parametrize("output_first", [False, True])
def test_the_copies_begin_as_in_the_whole_model(output_first: bool) -> None:
    with torch.device("meta"):
        whole = Tied(output_first)
    initialize_weights(whole, 0, CPU)
    first, middle, last = stages([0, 1, 2], output_first=output_first)
    assert torch.equal(first.tok_embeddings.weight, whole.output.weight)
    assert torch.equal(last.output.weight, whole.output.weight)
    assert torch.equal(last.output.bias, whole.output.bias)
    assert first.output is None and last.tok_embeddings is None
    # The owner has the first name in the whole model.
    copied = first.tok_embeddings if output_first else last.output
    assert copies_of([first, middle, last]) == {copied.weight}


def test_a_stage_knows_all_names_of_its_weights() -> None:
    _, middle, last = stages([0, 1, 2])
    assert first_names(last) == {"output.weight": "tok_embeddings.weight"}
    assert tied_embeddings([last]) == {"output.weight"}
    assert first_names(middle) == {} and sharing_of(middle) is not None
    with pytest.raises(KeyError), with_absent_modules(last):
        assert last.tok_embeddings.weight is last.output.weight
        raise KeyError
    assert last.tok_embeddings is None


def optimizers_of(parts: list[Tied]):
    config = JobConfig()
    config.optimizer.lr, config.optimizer.no_decay = 1.0, ["embedding"]
    config.optimizer.rules = [ParamRule("tok_embeddings", lr_scale=0.25)]
    return build_optimizer(list(parts), config, None)


def test_its_optimizer_has_the_settings_and_the_state_of_the_first_name() -> None:
    first, last = stages([0, 2])
    optimizers = optimizers_of([first, last])
    groups = [g for optimizer in optimizers for g in optimizer.param_groups]
    for param in (first.tok_embeddings.weight, last.output.weight):
        (group,) = [g for g in groups if any(p is param for p in g["params"])]
        assert (group["lr"], group["weight_decay"]) == (0.25, 0.0)
        param.grad = torch.ones_like(param)
    optimizers.step()
    assert torch.equal(first.tok_embeddings.weight, last.output.weight)
    saved = optimizers.state_dict()
    names = {key for key in saved if ".weight.exp_avg" in key and "layers" not in key}
    assert names == {
        "state.tok_embeddings.weight.exp_avg",
        "state.tok_embeddings.weight.exp_avg_sq",
    }

    # A rank with both stages must not have one state for two steps.
    optimizers.load_state_dict(saved)
    moments = [
        optimizer.state[param]["exp_avg"]
        for optimizer in optimizers
        for param in (first.tok_embeddings.weight, last.output.weight)
        if param in optimizer.state
    ]
    assert torch.equal(*moments) and moments[0].data_ptr() != moments[1].data_ptr()
    optimizers.step()
    assert torch.equal(first.tok_embeddings.weight, last.output.weight)


def test_models_that_share_nothing_do_nothing() -> None:
    part = nn.Linear(2, 2)
    copies = StageCopies([part], None)
    copies.sum_gradients()
    copies.spread_weights()
    assert not copies.parameters and part.weight.grad is None
