"""A parameter that a rank's tokens do not use has zeros there, and no other's gradient."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from harness import run_ranks
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from torchtitan.config import JobConfig
from torchtitan.distributed.fsdp import apply_fsdp, fsdp_modules, use_summed_gradients
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.runtime.process_group import init_distributed
from torchtitan.train import Trainer


class Block(nn.Module):
    """Uses one of its parts, all of a size."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(2, 2, bias=False) for _ in range(3)])

    def forward(self, x: torch.Tensor, choice: int) -> torch.Tensor:
        return self.parts[choice](x)


NAME = "set_reduce_scatter_unused_params"


def gradients(known_to_torch: bool) -> list[float]:
    """The sum of each part's gradient. Rank r uses part r, and nobody the last."""
    if not known_to_torch and hasattr(FSDPModule, NAME):
        delattr(FSDPModule, NAME)  # as in PyTorch 2.11
    init_distributed(timeout_seconds=60)
    model = nn.Module()
    model.layers = nn.ModuleDict({"0": Block()})
    config = JobConfig()
    config.training.mixed_precision_param = "float32"
    if dist.get_world_size() > 1:
        apply_fsdp(model, ParallelDims(world_size=2).world_mesh["dp"], config)
        use_summed_gradients(model)

    def forward_backward(*batch: Any) -> torch.Tensor:
        rank = dist.get_rank()
        loss = model.layers["0"](torch.full((1, 2), 10.0**rank), rank).sum()
        loss.backward()
        return loss.detach()

    params = list(model.parameters())
    trainer: Any = SimpleNamespace(
        device=torch.device("cpu"),
        job_config=config,
        fsdp_modules=fsdp_modules(model),
        forward_backward=forward_backward,
        _parameters=lambda: params,
    )
    Trainer._accumulate_gradients(trainer, [{}], torch.tensor(1))
    grads = [param.grad for param in params]
    found = [float((g.full_tensor() if isinstance(g, DTensor) else g).sum()) for g in grads]
    dist.destroy_process_group()
    return found


@pytest.mark.parametrize("known_to_torch", [False, hasattr(FSDPModule, NAME)])
def test_ranks_may_use_different_parts_of_a_block(known_to_torch: bool) -> None:
    assert run_ranks(gradients, 2, known_to_torch) == [[4.0, 40.0, 0.0]] * 2


def test_one_process_has_zeros_too() -> None:
    """Else its optimizer would skip the parameter, and its checkpoints would lack the state."""
    assert run_ranks(gradients, 1, True) == [[4.0, 0.0, 0.0]]
