"""Stages may hand on views, and give back gradients that are; the last one may return more."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from harness import run_ranks
from torch.distributed.device_mesh import init_device_mesh

from torchtitan.config import JobConfig
from torchtitan.distributed.pipeline_parallel import Pipeline
from torchtitan.distributed.pipeline_split import stages_of_rank
from torchtitan.runtime.process_group import init_distributed


class Halves(nn.Module):
    """Hands on two halves of the sequence, views of which one is contiguous.

    The gradient of what it receives is transposed.

    The last returns the whole, and in training a second one.
    """

    def __init__(self, first: bool, last: bool) -> None:
        super().__init__()
        self.first, self.last, self.layer = first, last, nn.Linear(4, 4)
        nn.init.constant_(self.layer.weight, 0.25)
        nn.init.zeros_(self.layer.bias)

    def forward(self, h: torch.Tensor, other: torch.Tensor | None = None) -> object:
        h = h if other is None else torch.cat([other, h], dim=1)
        h = self.layer(h.transpose(1, 2)).transpose(1, 2)
        if not self.last:
            return h[:, 2:], h[:, :2].contiguous().view_as(h[:, :2])
        return (h, 2 * h) if self.training else h


def loss(pred: tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
    return sum((part - labels).square().sum() for part in pred)


def gradients(schedule: str) -> dict[int, float]:
    init_distributed(timeout_seconds=60)
    config = JobConfig()
    config.parallelism.pipeline_parallel_degree = 2
    config.parallelism.pipeline_parallel_schedule = schedule
    config.parallelism.pipeline_parallel_microbatch_size = 2
    config.training.local_batch_size = 8
    stages = stages_of_rank(config, dist.get_rank())
    last = 2 * len(stages) - 1
    parts = [Halves(number == 0, number == last) for number in stages]
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("pp",))
    pipeline = Pipeline(parts, stages, mesh["pp"], config, loss)
    x = torch.arange(8 * 16.0).view(8, 4, 4) / 100
    pipeline.forward_backward(x, torch.zeros_like(x), {}, torch.tensor(1.0))
    found = [float(part.layer.weight.grad.norm()) for part in parts]
    dist.destroy_process_group()
    return dict(zip(stages, found, strict=True))


@pytest.mark.parametrize(("schedule", "stages"), [("1F1B", 2), ("ZBVZeroBubble", 4)])
def test_stages_hand_on_views(schedule: str, stages: int) -> None:
    by_rank = run_ranks(gradients, 2, schedule)
    found = {number: norm for own in by_rank for number, norm in own.items()}
    whole = [Halves(number == 0, number == stages - 1) for number in range(stages)]
    h = (torch.arange(8 * 16.0).view(8, 4, 4) / 100,)
    for part in whole:
        h = part(*h)
    loss(h, torch.zeros(())).backward()
    expected = [float(part.layer.weight.grad.norm()) for part in whole]
    assert [found[number] for number in range(stages)] == pytest.approx(expected, rel=1e-5)
