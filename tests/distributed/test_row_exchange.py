"""Rows reach the ranks of their experts, and come back, however uneven the load is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import on_ranks

from torchtitan.distributed.expert_parallel import RowExchange
from torchtitan.distributed.parallel_dims import ParallelDims

# Rows of each of 4 ranks for each of 4 experts; experts 0 and 1 are on the first ranks of `ep`.
LOADS = {
    "even": [[2, 2, 2, 2]] * 4,
    "uneven": [[3, 0, 1, 0], [0, 5, 0, 0], [1, 1, 1, 1], [0, 0, 0, 2]],
    "all for one expert": [[4, 0, 0, 0]] * 4,
    "a rank without rows": [[0, 0, 0, 0], [1, 2, 0, 1], [0, 0, 3, 0], [0, 1, 0, 0]],
}


def go_and_return(folder: Path, degrees: dict[str, int]) -> None:
    dims = ParallelDims(**degrees, world_size=4)
    mesh = dims.expert_mesh
    groups = {n: mesh[n].get_group() if n in mesh.mesh_dim_names else None for n in ("ep", "etp")}
    first = mesh.get_local_rank("ep") * (4 // dims.ep) if dims.ep_enabled else 0
    for load in LOADS.values():
        counts = torch.tensor(load[dist.get_rank()])
        expert = torch.arange(4).repeat_interleave(counts)
        # Each row has its expert's number, and one that no other row in the world has.
        own = torch.arange(len(expert)) + 100 * dist.get_rank()
        rows = torch.stack([expert, own], dim=1).double().requires_grad_()

        exchange = RowExchange(counts, len(rows), **groups)
        arrived = exchange.send(rows)
        expected = torch.arange(first, first + 4 // dims.ep).repeat_interleave(exchange.counts)
        assert arrived[:, 0].tolist() == expected.tolist()
        assert len(set(arrived[:, 1].tolist())) == len(arrived)

        # Each rank of `etp` computes a part, which add up to 1 + 2 + ... times the row.
        part = 1 + (mesh.get_local_rank("etp") if dims.etp_enabled else 0)
        whole = dims.etp * (dims.etp + 1) / 2
        back = exchange.send_back(arrived * part)
        assert torch.equal(back, rows * whole)
        (back * rows.detach()).sum().backward()
        assert torch.equal(rows.grad, rows.detach() * whole)


@pytest.mark.parametrize(
    "degrees",
    [
        {"dp_shard": 4, "ep": 4},
        {"dp_shard": 4, "ep": 2},
        {"dp_shard": 2, "tp": 2, "ep": 2, "etp": 2},
        {"dp_shard": 2, "tp": 2, "etp": 2},
    ],
    ids=["ep4", "ep2", "ep2_etp2", "etp2"],
)
def test_rows_go_to_their_experts_and_back(degrees, tmp_path):
    on_ranks(4, go_and_return, tmp_path, degrees)
