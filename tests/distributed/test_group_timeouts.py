"""`comm.timeout_seconds` holds for all process groups, also those of a mesh."""

import time

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from torch.distributed.device_mesh import init_device_mesh

from torchtitan.runtime.process_group import init_distributed
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
