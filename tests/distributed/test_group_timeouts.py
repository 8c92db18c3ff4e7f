"""`comm.timeout_seconds` holds for all groups, also those of a mesh, and to connect any."""

import time
from datetime import timedelta
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from torch.distributed.device_mesh import init_device_mesh

from torchtitan.errors import OutageError
from torchtitan.runtime.fake_world import fake_world
from torchtitan.runtime.process_group import init_distributed, patient_group
from torchtitan.runtime.world import rank


def wait_in_vain() -> float:
    init_distributed(timeout_seconds=2)
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b"))
    group = mesh["a", "b"]._flatten("ab").get_group()
    dist.barrier()
    begin = time.monotonic()
    if rank() == 0:
        with pytest.raises(RuntimeError, match=r"Timed out"):
            dist.all_reduce(torch.zeros(1), group=group)
    else:
        time.sleep(6)
    return time.monotonic() - begin


def test_a_group_of_a_mesh_has_the_timeout_too():
    assert run_ranks(wait_in_vain, 2)[0] < 5


def connect_in_vain() -> float:
    init_distributed(timeout_seconds=2)
    begin = time.monotonic()
    if rank() == 0:
        with pytest.raises(OutageError, match=r"comm\.timeout_seconds = 2\."):
            patient_group(timedelta(hours=2))
    else:
        dist.all_reduce(torch.zeros(1))
        dist.new_group(backend="gloo", timeout=timedelta(hours=2))
        time.sleep(4)
    return time.monotonic() - begin


def test_a_group_that_waits_for_long_connects_within_the_timeout():
    assert run_ranks(connect_in_vain, 2)[0] < 4


def test_a_rank_that_is_gone_meanwhile_is_no_outage(monkeypatch: pytest.MonkeyPatch):
    class Failed:
        def wait(self, timeout):
            raise RuntimeError("Connection closed by peer")

        def is_completed(self):
            return True

    with fake_world(2, rank=0):
        monkeypatch.setattr(dist, "new_group", lambda **options: None)
        monkeypatch.setattr(dist, "broadcast", lambda *args, **options: Failed())
        with pytest.raises(RuntimeError, match="closed by peer"):
            patient_group(timedelta(hours=2))


def test_thousands_of_ranks_do_not_meet_along_a_ring(monkeypatch: pytest.MonkeyPatch):
    with fake_world(1024, rank=0):
        monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: pytest.fail("a ring of gloo"))
        monkeypatch.setattr(dist, "new_group", lambda **options: None)
        monkeypatch.setattr(dist, "broadcast", lambda *args, **options: Mock())
        patient_group(timedelta(hours=2))


def wait_patiently() -> float:
    init_distributed(timeout_seconds=2)
    group = patient_group(timedelta(hours=2))
    total = torch.ones(1)
    if rank() == 1:
        time.sleep(3)
    dist.all_reduce(total, group=group)
    return total.item()


def test_once_connected_it_waits_for_long():
    assert run_ranks(wait_patiently, 2) == [2, 2]
