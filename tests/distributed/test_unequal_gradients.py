"""Parameters whose gradients nobody adds up are named; all that PyTorch places are not."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from harness import run_ranks
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from torchtitan.distributed.fsdp import use_summed_gradients
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.unequal_gradients import warn_of_unequal_gradients
from torchtitan.errors import ConfigError
from torchtitan.runtime.process_group import init_distributed


def warnings_of_a_step() -> list[str]:
    """Of 2 x 2 ranks; each has tokens of its own, and so other gradients."""
    init_distributed(timeout_seconds=60)
    dims = ParallelDims(tp=2, world_size=4)
    model = nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in ("whole", "fsdp", "tp")})
    model["frozen"] = nn.Linear(4, 4).requires_grad_(False)
    torch.manual_seed(0)
    for param in model.parameters():
        nn.init.normal_(param)
    weight = distribute_tensor(model["tp"].weight.detach(), dims.world_mesh["tp"], [Replicate()])
    model["tp"].weight = nn.Parameter(weight)
    fully_shard(model["fsdp"], mesh=dims.world_mesh["dp_shard_cp"])
    for name in ("whole", "fsdp", "tp"):
        grad = model[name].weight.grad = torch.ones_like(model[name].weight)
        alike = name != "whole" or dims.world_mesh["dp_shard"].get_local_rank() == 0
        (grad if name == "whole" else grad.to_local()).mul_(1 if alike else 2)

    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("torchtitan").addHandler(handler)
    warn_of_unequal_gradients([model], dims)
    dist.destroy_process_group()
    return told


def test_gradients_that_nobody_adds_up_are_told() -> None:
    """Only once: with thousands of ranks, one of each tensor-parallel group had told the same."""
    (message,), *others = run_ranks(warnings_of_a_step, 4)
    assert others == [[], [], []]
    assert message.startswith(
        "the ranks of data parallelism have different gradients of whole.weight (by 0.33 of their "
        "norm). Each rank then trains its own weights"
    )


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * self.scale


def refusal_of_a_plain_number(ranks: int) -> str:
    init_distributed(timeout_seconds=60)
    dims = ParallelDims(tp=2, world_size=ranks)
    model = Scaled()
    if dims.dp_enabled:
        fully_shard(model, mesh=dims.world_mesh["dp_shard_cp"])
        use_summed_gradients(model)
    hidden = distribute_tensor(torch.ones(2, 4), dims.world_mesh["tp"], [Shard(1)])
    with pytest.raises(ConfigError) as refused:
        model(hidden).sum().backward()
        warn_of_unequal_gradients([model], dims)
    dist.destroy_process_group()
    return str(refused.value)


@pytest.mark.parametrize("ranks", [2, 4])  # with FSDP, PyTorch's backward pass would fail first
def test_a_number_that_the_plan_leaves_out_is_refused(ranks: int) -> None:
    for said in run_ranks(refusal_of_a_plain_number, ranks, ranks):
        assert said.startswith("the model's parallelize_fn leaves out scale, but uses it with")
