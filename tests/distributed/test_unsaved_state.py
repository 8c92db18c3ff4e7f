"""What an author's optimizer keeps is saved whole and loaded as it was, or refused or told of."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from harness import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.components.unsaved_state import check_optimizer_state, warn_of_unequal_buffers
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.runtime.process_group import init_distributed

Update = Callable[[dict[str, Any], Any], None]


class Own(torch.optim.Optimizer):
    """Keeps what `update` makes of each gradient."""

    def __init__(self, model: nn.Module, update: Update) -> None:
        super().__init__(model.parameters(), {"lr": 0.1})
        self.update = update

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for param in self.param_groups[0]["params"]:
            self.update(self.state[param], param.grad)


def mean_of_columns(state: dict[str, Any], grad: Any) -> None:
    state["mean"] = grad.mean(0)
    state["count"] = state.get("count", 0) + 1


def local_mean(state: dict[str, Any], grad: Any) -> None:
    state["mean"] = {"of_rank": grad.to_local().mean(0)}


def local_norm(state: dict[str, Any], grad: Any) -> None:
    state["norm"] = grad.to_local().norm().item()


def warnings() -> list[str]:
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("torchtitan").addHandler(handler)
    return told


def save_and_load(update: Update) -> tuple[list[str], list[float]]:
    """The warnings after a step on each rank, and the mean as a checkpoint gives it back."""
    init_distributed(timeout_seconds=60)
    told = warnings()
    model = nn.Linear(2, 4, bias=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = Own(model, update)
    model.weight.grad = torch.ones_like(model.weight)
    model.weight.grad.to_local().mul_(1.0 + 2 * dist.get_rank())
    container = OptimizersContainer([(model, [optimizer])])
    container.step()
    check_optimizer_state(container, [model])
    state = container.state_dict()
    saved = state.get("state.weight.mean", torch.zeros(0))
    local = getattr(saved, "to_local", lambda: saved)().tolist()
    container.load_state_dict(state)
    dist.destroy_process_group()
    return told, local


def test_a_mean_over_ranks_is_saved_whole() -> None:
    """PyTorch keeps it as the terms of each rank, which no checkpoint can hold."""
    assert run_ranks(save_and_load, 2, mean_of_columns) == [([], [2.0, 2.0])] * 2


@pytest.mark.parametrize("update", [local_mean, local_norm])
def test_state_that_each_rank_has_for_itself_is_told_of(update: Update) -> None:
    (told, _), (other, _) = run_ranks(save_and_load, 2, update)
    assert len(told) == 1 and told[0].startswith("the optimizer's state of weight differs")
    assert other == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.bool])
def test_state_keeps_its_type(dtype: torch.dtype) -> None:
    model = nn.Linear(2, 2, bias=False)
    own = Own(model, lambda state, grad: state.update(mean=grad.mean(0).to(dtype), count=1))
    model.weight.grad = torch.ones_like(model.weight)
    container = OptimizersContainer([(model, [own])])
    container.step()
    container.load_state_dict(container.state_dict())
    assert own.state[model.weight]["mean"].dtype == dtype and own.state[model.weight]["count"] == 1


def warnings_of_buffers() -> list[str]:
    init_distributed(timeout_seconds=60)
    told = warnings()
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2, momentum=0.0))
    model.register_buffer("tally", torch.zeros(2), persistent=False)
    model(torch.randn(4, 2, generator=torch.Generator().manual_seed(dist.get_rank())))
    model.tally += dist.get_rank()
    warn_of_unequal_buffers([model], ParallelDims(world_size=2))
    dist.destroy_process_group()
    return told


def test_buffers_that_each_rank_changes_by_its_own_tokens_are_told_of() -> None:
    (told, *_), other = run_ranks(warnings_of_buffers, 2)
    assert told.startswith("the buffers 0.running_mean, 0.running_var differ between ranks")
    assert other == []
