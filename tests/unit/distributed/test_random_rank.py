"""Which ranks draw the same random numbers, as for dropout."""

from __future__ import annotations

from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.runtime.fake_world import fake_world


def test_only_ranks_of_tensor_parallelism_draw_alike() -> None:
    """Pipeline stages drew alike, and so dropped the same elements in several layers."""
    alike: dict[int, set[tuple[int, ...]]] = {}
    for rank in range(16):
        with fake_world(16, rank=rank):
            dims = ParallelDims(pp=2, dp_shard=2, cp=2, tp=2, world_size=16)
            own = tuple(dims.world_mesh[dim].get_local_rank() for dim in ("pp", "dp_shard", "cp"))
            alike.setdefault(dims.random_rank, set()).add(own)
    assert sorted(alike) == list(range(8))
    assert all(len(groups) == 1 for groups in alike.values())
    assert len(set.union(*alike.values())) == 8
