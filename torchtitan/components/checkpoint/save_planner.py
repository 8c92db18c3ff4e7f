"""Who writes what, with little for rank 0 to gather.

`torch.distributed.checkpoint` has each rank tell rank 0 all that it could write. About 13 values a
parameter are the same on all of its ranks: the options of the optimizer and the number of its
steps. So ranks that have the same names share out those values among a few of them, before they
tell.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from itertools import product
from math import prod
from operator import add
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultSavePlanner, Metadata, SavePlan
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
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
        plans, metadata = create_default_global_save_plan(self._dedup_save_plans(all_plans))
        check_chunks(metadata)
        metadata.planner_data = {}
        for plan in reversed(plans):
            metadata.planner_data |= plan.planner_data
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


def check_chunks(metadata: Metadata) -> None:
    """See that the chunks of each tensor are the whole of it, and each element is in one of them.

    PyTorch's check compares chunks in pairs, which takes minutes where thousands of ranks cut a
    tensor along two dimensions. Here a chunk counts 1 at its first corner, -1 at the neighbours of
    that, 1 at theirs and so on; the sums are those of the whole tensor only if nothing is missing,
    overlaps or sticks out.

    Raises:
        ValueError: it is not so.
    """
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        sums: Counter[tuple[int, ...]] = Counter()
        for chunk in entry.chunks:
            _add_corners(sums, chunk, 1)
        _add_corners(sums, ChunkStorageMetadata(torch.Size([0] * len(entry.size)), entry.size), -1)
        if any(sums.values()):
            first = min(corner for corner, count in sums.items() if count)
            raise ValueError(
                f"the ranks would not write each element of {name} {list(entry.size)} once: "
                f"its {len(entry.chunks)} parts have a gap, overlap or stick out at {list(first)}"
            )


def _add_corners(sums: Counter[tuple[int, ...]], chunk: ChunkStorageMetadata, weight: int) -> None:
    corners = product(*zip(chunk.offsets, map(add, chunk.offsets, chunk.sizes), strict=True))
    signs = product((weight,), *[(1, -1)] * len(chunk.offsets))
    for corner, sign in zip(corners, signs, strict=True):
        sums[corner] += prod(sign)
