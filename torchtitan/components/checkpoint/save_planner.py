"""Who writes what, with little for rank 0 to gather.

`torch.distributed.checkpoint` has each rank tell rank 0 all that it could write. About 13 values a
parameter are the same on all of its ranks: the options of the optimizer and the number of its
steps. So ranks that have the same names share out those values among a few of them, before they
tell. And where no rank has anything else to tell than at the last save, none tells it again.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from dataclasses import dataclass, field
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
from torch.distributed.checkpoint.storage import WriteResult

_SHARERS = 8
"""Ranks that write what all ranks with the same names have. The messages to rank 0 are as long as
the longest of them, so that one rank is too few; each rank that loads opens the files of all."""
_SMALL = 4096
"""Bytes. Larger tensors that are not sharded stay with PyTorch, which balances them by size."""


@dataclass
class LastSave:
    """What a rank keeps of a save for the next one, which it spares the telling and planning.

    PyTorch's `enable_plan_caching` keeps it by class, for all planners of a process; keeps on rank
    0 the plans of all ranks; and takes a tensor of another dtype for the same.
    """

    ended_well: bool = False
    """On all ranks. Set by who sees the end; a save that begins takes it back. So all ranks keep
    something of the same save, or some rank keeps nothing."""
    repeated: bool = False
    """Whether the save under way writes what the last one did, from all ranks to the same files."""
    told: SavePlan | None = None
    """What this rank could have written."""
    plan: SavePlan | None = None
    """What it did write."""
    results: list[WriteResult] = field(default_factory=list)
    """Where each item of that is."""
    metadata: bytes = b""
    """Contents of `.metadata`, on rank 0."""


class SharingSavePlanner(DefaultSavePlanner):
    """What is saved is what `DefaultSavePlanner` saves.

    Args:
        group: all ranks that save, with a backend for host tensors; None: there is one.
        last: of the same ranks, and of the writer of this save.
    """

    def __init__(self, group: dist.ProcessGroup | None, last: LastSave) -> None:
        super().__init__()
        self._group = group
        self._last = last

    def create_local_plan(self) -> SavePlan:
        last, plan = self._last, None
        try:
            plan = super().create_local_plan()
            for item in plan.items:
                if item.tensor_data is not None:  # else a save after one in the background differs
                    item.tensor_data.properties.pin_memory = False
        finally:  # the other ranks wait here for this one, also if it raises an error
            same = last.ended_well and plan == last.told
            last.ended_well = False
            own, last.repeated = own_share(sorted(self.state_dict), same, self._group)
        if last.repeated:
            return SavePlan([], usable=False)
        last.told = plan
        items = [item for item in plan.items if item.index.fqn in own or not _is_shared(item)]
        self.plan = dataclasses.replace(
            plan,
            # By size, as PyTorch writes from a GPU: a save in the background writes as others do.
            items=sorted(items, key=lambda item: item.tensor_storage_size() or 0),
            planner_data={key: path for key, path in self.mappings.items() if key in own},
        )
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        if self._last.repeated:
            return all_plans, Metadata({})
        plans, metadata = create_default_global_save_plan(self._dedup_save_plans(all_plans))
        check_chunks(metadata)
        metadata.planner_data = {}
        for plan in reversed(plans):
            metadata.planner_data |= plan.planner_data
        # It is in the metadata now, and ranks need it no more.
        return [dataclasses.replace(plan, planner_data=None) for plan in plans], metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        if not self._last.repeated:
            self._last.plan = new_plan
        assert self._last.plan is not None
        return super().finish_plan(self._last.plan)


def own_share(
    keys: list[str], same: bool, group: dist.ProcessGroup | None
) -> tuple[set[str], bool]:
    """The keys, of sorted ones, that are this rank's among the ranks with the same keys.

    All ranks of `group` call this together. Of keys that only some ranks have, such as those of a
    pipeline stage, none is left out.

    Returns:
        The keys, and whether `same` is true on all ranks.
    """
    if group is None or dist.get_world_size(group) == 1:
        return set(keys), same
    digest = hashlib.blake2b("\n".join(keys).encode(), digest_size=8).digest()
    own = torch.tensor([[int.from_bytes(digest, "big", signed=True), same]])
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own, group=group)
    digests, all_same = torch.cat(gathered).unbind(1)
    sharers = (digests == own[0, 0]).nonzero().flatten()[:_SHARERS].tolist()
    rank = dist.get_rank(group)
    share = set(keys[sharers.index(rank) :: len(sharers)]) if rank in sharers else set()
    return share, bool(all_same.all())


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
