"""Sums over all ranks by pairs of them are those along a ring."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks

from torchtitan.components.stragglers import Stragglers
from torchtitan.config import JobConfig
from torchtitan.runtime import host_sum
from torchtitan.runtime.host_sum import sum_over_ranks
from torchtitan.runtime.process_group import init_distributed


def sums() -> tuple[int, list[int], list[float]]:
    host_sum._FEW = 1
    init_distributed(timeout_seconds=60)
    messages = 0
    send = dist.send

    def counted(*args: object, **options: object) -> None:
        nonlocal messages
        messages += 1
        send(*args, **options)

    dist.send = counted
    first = torch.tensor([10 ** dist.get_rank(), 2**62 // dist.get_world_size()])
    second = torch.tensor([dist.get_rank() + 0.1, 1e-9, 1e7 / (dist.get_rank() + 3)])
    sum_over_ranks(first)
    sent = messages
    sum_over_ranks(second)
    for op, found in (dist.ReduceOp.MAX, dist.get_world_size() - 1), (dist.ReduceOp.MIN, 0):
        last = torch.tensor(dist.get_rank())
        sum_over_ranks(last, op)
        assert last == found
    dist.destroy_process_group()
    return sent, first.tolist(), second.tolist()


@pytest.mark.parametrize(
    ("ranks", "messages"), [(1, [0]), (2, [1, 1]), (4, [2] * 4), (6, [3, 3, 2, 2, 1, 1])]
)
def test_each_rank_has_the_sum_of_all(ranks: int, messages: list[int]) -> None:
    expected = [sum(10**r for r in range(ranks)), 2**62 // ranks * ranks]
    told = run_ranks(sums, ranks)
    assert [sent for sent, _, _ in told] == messages
    assert [found[1] for found in told] == [expected] * ranks
    assert [found[2] for found in told] == [told[0][2]] * ranks  # to the last bit
    assert told[0][2][0] == pytest.approx(sum(range(ranks)) + 0.1 * ranks)


def measured() -> dict[str, float]:
    """Of a step in which the last rank is late for the sum."""
    host_sum._FEW = 1
    init_distributed(timeout_seconds=20)
    config = JobConfig()
    config.metrics.straggler_freq = 1
    stragglers = Stragglers(config, [torch.nn.Linear(1, 1)], torch.device("cpu"))
    with stragglers.measure(1):
        if dist.get_rank() == dist.get_world_size() - 1:
            time.sleep(1)
        sum_over_ranks(torch.tensor(1))
    found = stragglers.metrics()
    dist.destroy_process_group()
    return found


def test_waiting_for_a_late_rank_is_not_a_rank_s_own_time() -> None:
    found, *_ = told = run_ranks(measured, 3)
    assert told == [found] * 3
    assert found["slowest_rank"] == 2 and found["own_seconds_max"] >= 1
    assert found["own_seconds_mean"] < 0.6
