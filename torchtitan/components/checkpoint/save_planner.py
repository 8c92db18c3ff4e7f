"""Who writes what, with little for rank 0 to gather.

`torch.distributed.checkpoint` has each rank tell rank 0 all that it could write. About 13 values a
parameter are the same on all of its ranks: the options of the optimizer and the number of its
steps. So ranks that have the same names share out those values among a few of them, before they
tell.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultSavePlanner, Metadata, SavePlan
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

_SHARERS = 8
"""Ranks that write what all ranks with the same names have. The messages to rank 0 are as long as
the longest of them, so that one rank is too few; each rank that loads opens the files of all."""
_SMALL = 4096
"""Bytes. Larger tensors that are not sharded stay with PyTorch, which balances them by size."""


class SharingSavePlanner(DefaultSavePlanner):
    """What is saved is what `DefaultSavePlanner` saves.

    Args:
        group: all ranks that save, with a backend for host tensors; None: there is one.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self._group = group

    def create_local_plan(self) -> SavePlan:
        # First what needs the other ranks, which would wait if this one raised an error before.
        own = own_share(sorted(self.state_dict), self._group)
        plan = super().create_local_plan()
        self.plan = dataclasses.replace(
            plan,
            items=[item for item in plan.items if item.index.fqn in own or not _is_shared(item)],
            planner_data={key: path for key, path in self.mappings.items() if key in own},
        )
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = super().create_global_plan(all_plans)
        # It is in the metadata now, and ranks need it no more.
        return [dataclasses.replace(plan, planner_data=None) for plan in plans], metadata


def own_share(keys: list[str], group: dist.ProcessGroup | None) -> set[str]:
    """The keys, of sorted ones, that are this rank's among the ranks with the same keys.

    All ranks of `group` call this together. Of keys that only some ranks have, such as those of a
    pipeline stage, none is left out.
    """
    if group is None or dist.get_world_size(group) == 1:
        return set(keys)
    digest = hashlib.blake2b("\n".join(keys).encode(), digest_size=8).digest()
    own = torch.tensor([int.from_bytes(digest, "big", signed=True)])
    digests = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(digests, own, group=group)
    sharers = (torch.cat(digests) == own).nonzero().flatten()[:_SHARERS].tolist()
    rank = dist.get_rank(group)
    return set(keys[sharers.index(rank) :: len(sharers)]) if rank in sharers else set()


def _is_shared(item: WriteItem) -> bool:
    size: Any = item.tensor_storage_size()
    return item.type == WriteItemType.BYTE_IO or (
        item.type == WriteItemType.TENSOR and size <= _SMALL
    )
