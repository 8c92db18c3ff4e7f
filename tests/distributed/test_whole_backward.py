"""Checkpointed blocks are recomputed once, also by schedules with two backward passes."""

from __future__ import annotations

import logging
from logging.handlers import BufferingHandler

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from harness import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from torchtitan.config import JobConfig
from torchtitan.distributed.pipeline_parallel import Pipeline
from torchtitan.distributed.pipeline_split import stages_of_rank
from torchtitan.runtime.process_group import init_distributed

MICRO_BATCHES = 4


class Block(nn.Module):
    """Two matrices in a checkpoint. Counts its forward passes in training."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.passes = nn.Linear(4, 4), nn.Linear(4, 4), 0

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inner, h, use_reentrant=False)

    def inner(self, h: torch.Tensor) -> torch.Tensor:
        self.passes += self.training
        return self.two(self.one(h).relu())


def loss(pred: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return (pred - labels).square().sum()


def passes(schedule: str) -> tuple[list[int], int]:
    """Of each stage of the rank; and the warnings."""
    init_distributed(timeout_seconds=60)
    told = BufferingHandler(100)
    logging.getLogger("torchtitan.rank0").addHandler(told)
    config = JobConfig()
    config.activation_checkpoint.mode = "full"
    config.parallelism.pipeline_parallel_degree = 2
    config.parallelism.pipeline_parallel_schedule = schedule
    config.training.local_batch_size = MICRO_BATCHES
    stages = stages_of_rank(config, dist.get_rank())
    parts = [Block() for _ in stages]
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("pp",))
    pipeline = Pipeline(parts, stages, mesh["pp"], config, loss)
    x = torch.rand(MICRO_BATCHES, 4)
    pipeline.forward_backward(x, torch.zeros_like(x), {}, torch.tensor(1.0))
    assert all(param.grad is not None for part in parts for param in part.parameters())
    dist.destroy_process_group()
    return [part.passes for part in parts], len(told.buffer)


@pytest.mark.parametrize("schedule", ["InterleavedZeroBubble", "ZBVZeroBubble"])
def test_a_block_is_recomputed_once(schedule: str) -> None:
    each = [2 * MICRO_BATCHES] * 2
    assert run_ranks(passes, 2, schedule) == [(each, 1), (each, 0)]
