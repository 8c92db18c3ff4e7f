"""Sums over all ranks along rows of them are those along one ring."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks

from torchtitan.runtime import host_sum
from torchtitan.runtime.host_sum import HostSum, rows_of
from torchtitan.runtime.process_group import init_distributed


def sums(few: int) -> tuple[int, list[int], list[float]]:
    host_sum._FEW = few
    init_distributed(timeout_seconds=60)
    add_up = HostSum()
    first = torch.tensor([10 ** dist.get_rank(), 2**62 // dist.get_world_size()])
    second = torch.tensor([dist.get_rank() + 0.1, 1e-9, 1e7 / (dist.get_rank() + 3)])
    add_up(first)
    add_up(second)
    last = torch.tensor(dist.get_rank())
    add_up(last, dist.ReduceOp.MAX)
    assert last == dist.get_world_size() - 1
    groups = len(dist.distributed_c10d._world.pg_map)
    dist.destroy_process_group()
    return groups, first.tolist(), second.tolist()


@pytest.mark.parametrize(("ranks", "few", "groups"), [(6, 1, 3), (5, 1, 3), (4, 4, 1)])
def test_each_rank_has_the_sum_of_all(ranks: int, few: int, groups: int) -> None:
    expected = [sum(10**r for r in range(ranks)), 2**62 // ranks * ranks]
    told = run_ranks(sums, ranks, few)
    assert [found[:2] for found in told] == [(groups, expected)] * ranks
    assert [found[2] for found in told] == [told[0][2]] * ranks  # to the last bit
    assert told[0][2][0] == pytest.approx(sum(range(ranks)) + 0.1 * ranks)


@pytest.mark.parametrize(
    ("ranks", "rows", "longest"),
    [(1, 1, 1), (16, 1, 16), (17, 4, 5), (1024, 32, 32), (9992, 99, 101), (10_000, 100, 100)],
)
def test_a_row_has_about_as_many_ranks_as_there_are_rows(
    ranks: int, rows: int, longest: int
) -> None:
    """Also where nothing divides their number, as when a host is lost."""
    found = rows_of(ranks)
    assert [rank for row in found for rank in row] == list(range(ranks))
    assert len(found) == rows
    assert {len(row) for row in found} <= {longest, longest - 1}
