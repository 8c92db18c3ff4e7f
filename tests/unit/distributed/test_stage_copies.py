"""Weights that several stages of a pipeline have, on one process."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from checkpoint_run import world_of_one  # noqa: F401
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate

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
from torchtitan.errors import ConfigError
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


class Twice(Tied):
    """The embedding is needed again after the layers, under a second name."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.again = self.tok_embeddings
        if not tied:
            self.output = nn.Linear(8, 16)


@pytest.mark.parametrize("tied", [False, True])
def test_one_module_may_have_names_in_two_stages(tied: bool) -> None:
    config = JobConfig()
    config.parallelism.pipeline_parallel_degree = 3
    with torch.device("meta"):
        model, whole = Twice(tied), Twice(tied)
    parts = split_model(model, config, [0, 1, 2], ("tok_embeddings",), ("again", "output"))
    for part in (whole, *parts):
        initialize_weights(part, 0, CPU)
    first, middle, last = parts
    assert middle.tok_embeddings is middle.again is first.again is last.tok_embeddings is None
    assert torch.equal(first.tok_embeddings.weight, whole.again.weight)
    assert torch.equal(last.again.weight, whole.again.weight)
    assert torch.equal(last.output.weight, whole.output.weight)
    assert copies_of(parts) == {last.again.weight}


def test_a_stage_knows_all_names_of_its_weights() -> None:
    _, middle, last = stages([0, 1, 2])
    assert first_names(last) == {"output.weight": "tok_embeddings.weight"}
    assert tied_embeddings([last]) == {"output.weight"}
    assert first_names(middle) == {} and sharing_of(middle).weights
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


def test_terms_of_ranks_are_added_up_before_those_of_stages() -> None:
    """One stage may have terms, as of each rank's tokens, where another has whole gradients."""
    parts = stages([0, 2])
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("pp", "tp"))
    params = []
    for module, place in ((parts[0].tok_embeddings, Partial()), (parts[1].output, Replicate())):
        local = torch.ones(16, 8)
        param = nn.Parameter(DTensor.from_local(local, mesh["tp"], [Replicate()]))
        param.grad = DTensor.from_local(local.clone(), mesh["tp"], [place])
        module.weight = param
        params.append(param)
    StageCopies(parts, mesh["pp"], []).sum_gradients()
    for param in params:
        assert param.grad.placements == param.placements
        assert torch.equal(param.grad.to_local(), torch.full((16, 8), 2.0))


def test_models_that_share_nothing_do_nothing() -> None:
    part = nn.Linear(2, 2)
    copies = StageCopies([part], None, [])
    copies.sum_gradients()
    copies.spread_weights()
    assert not copies.parameters and part.weight.grad is None


def decay_all_but_embeddings(part: Tied) -> torch.optim.Optimizer:
    decays = {False: [], True: []}
    for name, param in part.named_parameters():
        decays["embeddings" not in name].append(param)
    groups = [{"params": decays[on], "weight_decay": 0.1 * on} for on in decays if decays[on]]
    return torch.optim.SGD(groups, lr=1.0)


def freeze_embeddings(part: Tied) -> torch.optim.Optimizer:
    if part.tok_embeddings is not None:
        part.tok_embeddings.requires_grad_(False)
    return torch.optim.SGD([p for p in part.parameters() if p.requires_grad])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (decay_all_but_embeddings, r"weight_decay=0.0\) and .* weight_decay=0.1\)"),
        (freeze_embeddings, r"frozen and .* trained by SGD"),
    ],
)
def test_copies_that_would_become_unequal_are_refused(build, message: str) -> None:
    """An author's optimizer may go by the name in the stage."""
    parts = stages([0, 2])
    mesh = init_device_mesh("cpu", (1,))
    with pytest.raises(ConfigError, match=message):
        StageCopies(parts, mesh, [build(part) for part in parts]).spread_weights()
    StageCopies(parts, mesh, [torch.optim.SGD(parts[1].parameters())])
    alike = [torch.optim.SGD(part.requires_grad_().parameters()) for part in parts]
    StageCopies(parts, mesh, alike).spread_weights()


class Bare(ModelProtocol):
    """Three modules share a weight: a bare parameter, and two with parameters of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(4, 4))
        self.mix = nn.Linear(4, 4)
        self.layers = nn.ModuleDict({str(i): nn.Linear(4, 4) for i in range(2)})
        self.head = nn.Linear(4, 4)
        self.mix.weight = self.head.weight = self.table

    def init_weights(self) -> None:
        if self.table is not None:
            nn.init.normal_(self.table)


def test_more_than_two_stages_may_share_a_weight_also_a_bare_parameter() -> None:
    config = JobConfig()
    config.parallelism.pipeline_parallel_degree = 4
    config.parallelism.pipeline_parallel_split_points = ["mix", "layers.0", "head"]
    with torch.device("meta"):
        whole, model = Bare(), Bare()
    initialize_weights(whole, 0, CPU)
    parts = split_model(model, config, [0, 1, 2, 3], ("table", "mix"), ("head",))
    for part in parts:
        initialize_weights(part, 0, CPU)
    first, second, _, last = parts
    for copied in (first.table, second.mix.weight, last.head.weight):
        assert torch.equal(copied, whole.table)
    assert torch.equal(last.head.bias, whole.head.bias)
    assert copies_of(parts) == {second.mix.weight, last.head.weight}
    assert first_names(last) == {"mix.weight": "table", "head.weight": "table"}
    assert first.mix is None and second.table is None and last.table is None
