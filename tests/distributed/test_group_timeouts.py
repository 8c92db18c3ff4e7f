"""`comm.timeout_seconds` holds for all groups, also those of a mesh, and to connect any."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from torch.distributed.device_mesh import init_device_mesh

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


def connect_in_vain(gone: bool) -> tuple[str, float]:
    init_distributed(timeout_seconds=2)
    begin = time.monotonic()
    if rank() == 0:
        with pytest.raises(Exception) as caught:
            patient_group(timedelta(hours=2))
        return repr(caught.value), time.monotonic() - begin
    dist.all_reduce(torch.zeros(1))
    dist.new_group(backend="gloo", timeout=timedelta(hours=2))
    if gone:
        dist.destroy_process_group()
    else:
        time.sleep(4)
    return "", 0.0


@pytest.mark.parametrize(
    ("gone", "error"), [(False, "OutageError('ranks could not connect"), (True, "RuntimeError(")]
)
def test_a_group_that_waits_for_long_connects_within_the_timeout(gone: bool, error: str):
    (found, seconds), _ = run_ranks(connect_in_vain, 2, gone)
    assert found.startswith(error) and seconds < 4


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
