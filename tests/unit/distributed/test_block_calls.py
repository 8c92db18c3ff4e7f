"""Ranks of one stage must call the same modules in training; those of other stages need not."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn as nn

from torchtitan.config import JobConfig
from torchtitan.distributed import pipeline_parallel
from torchtitan.distributed.block_calls import BlockCalls, warn_of_repeated_layers
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.pipeline_parallel import Pipeline
from torchtitan.errors import TrainingError
from torchtitan.runtime.fake_world import fake_world

BLOCK = nn.Linear(1, 1)


def calls(pp_rank: int, names: str) -> BlockCalls:
    """Of one of two ranks in each of two stages."""
    dims: Any = SimpleNamespace(pp=2, pp_rank=pp_rank, world_size=4)
    made = BlockCalls([], dims)
    for name in names:
        made._record(name.encode(), BLOCK.train(), ())
    return made


def sums(ranks: list[BlockCalls]) -> list[int]:
    return [sum(numbers) for numbers in zip(*(rank.take_digests() for rank in ranks), strict=True)]


def test_stages_may_differ_and_evaluation_does_not_count() -> None:
    ranks = [calls(0, "ab"), calls(0, "ab"), calls(1, "cd"), calls(1, "cd")]
    ranks[0]._record(b"a", BLOCK.eval(), ())
    for _ in range(2):
        total = sums(ranks)
        for rank in ranks:
            rank.refuse_unequal(total, 1)


def test_ranks_of_a_stage_may_not() -> None:
    ranks = [calls(0, "ab"), calls(0, "ab"), calls(1, "cd"), calls(1, "dc")]
    total = sums(ranks)
    ranks[0].refuse_unequal(total, 1)
    for rank in ranks[2:]:
        with pytest.raises(TrainingError, match="in step 1, forward"):
            rank.refuse_unequal(total, 1)


class Looped(nn.Module):
    def __init__(self, loops: int) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"0": nn.Linear(1, 1), "1": nn.Linear(1, 1)})
        self.layers["2"] = self.layers["0"]  # in two places, so two calls are right
        self.loops = loops

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.loops):
            for layer in self.layers.values():
                x = layer(x)
        return x


@pytest.mark.parametrize("loops", [1, 2])
def test_a_loop_over_the_layers_of_a_stage_is_told_once(loops: int, caplog: Any) -> None:
    part = Looped(loops)
    warn_of_repeated_layers(3, part)
    for _ in range(2):
        part(torch.ones(1, 1))
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == loops - 1
    for message in told:
        assert message.startswith("forward() of pipeline stage 3 calls layers.0, layers.1 several")


def test_one_rank_of_each_stage_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """With thousands of ranks, each had told the same."""
    config, told = JobConfig(), []
    config.parallelism.pipeline_parallel_degree = 2
    for rank in range(4):
        tell = partial(lambda rank, stage, part: told.append((rank, stage)), rank)
        monkeypatch.setattr(pipeline_parallel, "warn_of_repeated_layers", tell)
        with fake_world(4, rank):
            mesh = ParallelDims(pp=2, world_size=4).world_mesh["pp"]
            stage = mesh.get_local_rank()
            Pipeline([nn.Linear(1, 1)], [stage], mesh, config, torch.sub)
    assert told == [(0, 0), (2, 1)]
