"""Sums over all ranks along rows and columns are those along one ring."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks

from torchtitan.distributed import host_sum
from torchtitan.distributed.host_sum import HostSum, grid
from torchtitan.distributed.utils import init_distributed


def sums(few: int) -> tuple[int, list[int], list[int]]:
    host_sum._FEW = few
    init_distributed(timeout_seconds=60)
    add_up = HostSum()
    first = torch.tensor([10 ** dist.get_rank(), 2**62 // dist.get_world_size()])
    second = torch.tensor([dist.get_rank()])
    add_up(first)
    add_up(second)
    dist.destroy_process_group()
    return len(add_up._groups), first.tolist(), second.tolist()


@pytest.mark.parametrize(("ranks", "few", "groups"), [(6, 1, 2), (5, 1, 1), (4, 4, 1)])
def test_each_rank_has_the_sum_of_all(ranks: int, few: int, groups: int) -> None:
    expected = [sum(10**r for r in range(ranks)), 2**62 // ranks * ranks]
    assert run_ranks(sums, ranks, few) == [(groups, expected, [sum(range(ranks))])] * ranks


def test_grids_are_near_to_squares() -> None:
    sizes = {1: (1, 1), 16: (1, 16), 24: (4, 6), 1024: (32, 32), 10_000: (100, 100), 17: (1, 17)}
    assert {ranks: grid(ranks) for ranks in sizes} == sizes
