"""What a process has open when thousands of ranks meet: sockets, and the limit of open files."""

from __future__ import annotations

import os
import resource
from contextlib import suppress

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks

from torchtitan.runtime.process_group import init_distributed
from torchtitan.runtime.world import rank

RANKS = 4
GROUPS = 5


def _sockets() -> int:
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # of the listing itself
            count += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
    return count


def make_groups() -> dict[str, int]:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    init_distributed(timeout_seconds=60)
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    before = _sockets()
    groups = [dist.new_group() for _ in range(GROUPS)]
    dist.barrier()
    made = _sockets()
    # All kinds of collectives that training has on the host find their connections.
    for group in groups:
        total = torch.tensor([float(rank())])
        dist.all_reduce(total, group=group)
        assert total.item() == sum(range(RANKS))
        found: list[int] = [-1] * RANKS
        dist.all_gather_object(found, rank(), group=group)
        assert found == list(range(RANKS))
        told = [rank()]
        dist.broadcast_object_list(told, src=RANKS - 1, group=group)
        assert told == [RANKS - 1]
        gathered = [torch.empty(1) for _ in range(RANKS)] if rank() == 0 else None
        dist.gather(torch.ones(1), gathered, dst=0, group=group)
        received = torch.empty(1)
        sends = [dist.P2POp(dist.isend, torch.ones(1), (rank() + 1) % RANKS, group)]
        sends += [dist.P2POp(dist.irecv, received, (rank() - 1) % RANKS, group)]
        for work in dist.batch_isend_irecv(sends):
            work.wait()
        assert received.item() == 1
        dist.barrier(group=group)
    dist.destroy_process_group()
    return {"by groups": made - before, "soft": soft, "hard": hard}


def test_a_group_connects_ranks_when_they_have_something_to_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TORCH_GLOO_LAZY_INIT", raising=False)
    for facts in run_ranks(make_groups, RANKS):
        assert facts["by groups"] < GROUPS * (RANKS - 1)
        assert facts["soft"] == facts["hard"]


def test_a_users_own_value_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_GLOO_LAZY_INIT", "0")
    for facts in run_ranks(make_groups, RANKS):
        assert facts["by groups"] >= GROUPS * (RANKS - 1)
