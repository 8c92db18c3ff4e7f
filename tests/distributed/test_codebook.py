"""`Codebook` of docs/own_parts.md is the same on every number of ranks and micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from harness import run_ranks

from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.runtime.process_group import init_distributed

_PAGE = Path(__file__).parents[2] / "docs" / "own_parts.md"


def trained_and_expected() -> tuple[list[list[float]], list[list[float]]]:
    """The sums after a step of two micro-batches on two ranks, and of one batch on one."""
    shown: dict[str, Any] = {}
    exec(_PAGE.read_text().partition("# codebook.py\n")[2].partition("```")[0], shown)
    init_distributed(timeout_seconds=60)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), shown["Codebook"](4, 2))
    model[1].reset_parameters()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    shown["build_usual_optimizer"] = lambda *_: OptimizersContainer([(model, [sgd])])
    optimizers = shown["build_optimizer"]([model], None, ParallelDims(world_size=2))
    batch, before = torch.randn(4, 3, 2), model[1].sums.clone()
    optimizers.step()  # without a batch
    assert torch.equal(model[1].sums, before)
    model(batch)
    expected = before.lerp(model[1].tally, 0.05)
    model[1].tally.zero_()
    for rows in batch.chunk(2)[dist.get_rank()].chunk(2):
        model(rows)
    optimizers.step()
    dist.destroy_process_group()
    assert not torch.equal(model[1].sums, before)
    return model[1].sums.tolist(), expected.tolist()


def test_two_ranks_have_the_codebook_of_one() -> None:
    for sums, expected in run_ranks(trained_and_expected, 2):
        torch.testing.assert_close(torch.tensor(sums), torch.tensor(expected))
