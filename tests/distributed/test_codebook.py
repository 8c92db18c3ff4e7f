"""`Codebook` of docs/own_modules.md is the same on every number of ranks and micro-batches.

It can also be compiled in a checkpointed layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from harness import run_ranks

from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.distributed.activation_checkpoint import checkpointed
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.runtime.process_group import init_distributed

_PAGE = Path(__file__).parents[2] / "docs" / "own_modules.md"


def documented() -> dict[str, Any]:
    shown: dict[str, Any] = {}
    exec(_PAGE.read_text().partition("# codebook.py\n")[2].partition("```")[0], shown)
    return shown


def trained_and_expected() -> tuple[list[list[float]], list[list[float]]]:
    """The sums after a step of two micro-batches on two ranks, and of one batch on one."""
    shown = documented()
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


def test_a_checkpointed_layer_with_a_codebook_is_one_graph() -> None:
    book = documented()["Codebook"](4, 2)
    book.reset_parameters()
    batch = torch.randn(4, 3, 2, requires_grad=True)
    expected = book(batch), book.tally.clone()
    book.tally.zero_()
    layer = checkpointed(book, book.forward, None)
    out = torch.compile(layer, backend="eager", fullgraph=True)(batch)
    torch.testing.assert_close((out, book.tally), expected)
