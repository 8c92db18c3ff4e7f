"""Plan which rank writes what, with little data for rank 0 to gather.

In `torch.distributed.checkpoint`, each rank sends rank 0 a plan of all that it could write. About
13 values per parameter are the same on all of its ranks: the optimizer's options and step count. So
ranks with the same names first divide those values among a few of them. Likewise, the replicas of a
shard divide the tensors among them. Rank 0 receives tables of numbers, and answers with what else
several ranks would have written. And if no rank's plan has changed since the last save, no rank
sends it again.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultSavePlanner, Metadata, SavePlan
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate

from torchtitan.distributed.dtensor import finding_once

from .save_table import Places, SaveTable, ToldItems

_SHARERS = 8
"""Ranks that write the values common to all ranks with the same names. Messages to rank 0 are all
as long as the longest, so one rank is too few; each rank that loads opens the files of all of them,
so there should not be many."""
_SMALL = 4096
"""Bytes. Larger unsharded tensors are left to PyTorch, which balances them by size."""


@dataclass
class LastSave:
    """Plans that a rank keeps from a save, so that the next one need not send and make them again.

    PyTorch's `enable_plan_caching` does not suffice: it caches by class, for all planners of a
    process; keeps the plans of all ranks on rank 0; and does not notice a changed dtype.
    """

    ended_well: bool = False
    """Whether the save succeeded on all ranks. Set by the caller that sees its end, and reset when
    a save begins. So either all ranks keep plans of the same save, or some rank keeps none."""
    repeated: bool = False
    """Whether the save in progress writes the same items to the same files as the last, on all
    ranks."""
    told: SavePlan | None = None
    """Plan of all that this rank could have written."""
    plan: SavePlan | None = None
    """Plan of the items that it did write."""
    places: Places | None = None
    """Where these are."""
    table: SaveTable | None = None
    """On rank 0, what all ranks wrote."""
    places_of_all: dict[int, Places] = field(default_factory=dict)
    """On rank 0, rank -> where that is."""
    metadata: bytes = b""
    """Contents of `.metadata`, on rank 0."""


class SharingSavePlanner(DefaultSavePlanner):
    """Plans to save the same state as `DefaultSavePlanner`.

    Args:
        group: all ranks, with a backend for host tensors.
        last: the last save of the same ranks, shared with the writer of this save.
    """

    def __init__(self, group: dist.ProcessGroup, last: LastSave) -> None:
        super().__init__()
        self._group = group
        self._last = last

    def create_local_plan(self) -> SavePlan:
        last, plan = self._last, None
        try:
            with finding_once():
                plan = super().create_local_plan()
            for item in plan.items:
                if item.tensor_data is not None:  # or plans differ after a background save
                    item.tensor_data.properties.pin_memory = False
        finally:  # the other ranks wait here for this one, even if it raises an error
            same = last.ended_well and plan == last.told
            last.ended_well = False
            alike, last.repeated = ranks_alike(self.state_dict, same, self._group)
        if last.repeated:
            return SavePlan([], usable=False)
        last.told = plan
        own = own_share(self.state_dict, alike, dist.get_rank())
        left = left_out(self.state_dict, alike, dist.get_rank())

        def is_written(item: WriteItem) -> bool:
            return item.index.fqn in own if _is_shared(item) else item.index.fqn not in left

        # By size, the order in which PyTorch writes from a GPU, so that background saves write in
        # the same order as others.
        items = sorted(
            filter(is_written, plan.items), key=lambda item: item.tensor_storage_size() or 0
        )
        self.plan = dataclasses.replace(plan, items=items)
        paths = {key: path for key, path in self.mappings.items() if key in own}
        return SavePlan(cast(Any, ToldItems.of(items, plan.items, paths)))

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Return what each rank leaves to others, and empty metadata, which the ranks are sent."""
        if self._last.repeated:
            return all_plans, Metadata({})
        self._last.table = SaveTable(cast(Any, [plan.items for plan in all_plans]))
        left: Any = self._last.table.not_written()
        return [SavePlan(numbers) for numbers in left], Metadata({})

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        if not self._last.repeated:
            left = set(cast(Any, new_plan.items))
            items = [item for number, item in enumerate(self.plan.items) if number not in left]
            self._last.plan = dataclasses.replace(new_plan, items=items)
        assert self._last.plan is not None
        return super().finish_plan(self._last.plan)


def ranks_alike(
    state: dict[str, Any], same: bool, group: dist.ProcessGroup
) -> tuple[list[int], bool]:
    """Return the ranks with the names and sharded tensors of this one, and whether `same` is true
    on all ranks. All ranks of `group` call this together.
    """
    names = (
        f"{name} {value.shape} {value.placements}" if isinstance(value, DTensor) else name
        for name, value in state.items()
    )
    digest = hashlib.blake2b("\n".join(sorted(names)).encode(), digest_size=8).digest()
    own = torch.tensor([[int.from_bytes(digest, "big", signed=True), same]])
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own, group=group)
    digests, all_same = torch.cat(gathered).unbind(1)
    return (digests == own[0, 0]).nonzero().flatten().tolist(), bool(all_same.all())


def own_share(names: Iterable[str], alike: list[int], rank: int) -> set[str]:
    """Return the share of `rank` in the names that the ranks `alike` have.

    So each name is in some rank's share, also if only some ranks have it, such as those of a
    pipeline stage.
    """
    sharers = alike[:_SHARERS]
    return set(sorted(names)[sharers.index(rank) :: len(sharers)]) if rank in sharers else set()


def left_out(state: dict[str, Any], alike: list[int], rank: int) -> set[str]:
    """Return the sharded tensors of whose shard on `rank` another of the ranks `alike` has a copy,
    which that rank writes. The ranks take turns by size, so that all write about equally much.
    """
    by_layout: dict[Any, list[str]] = defaultdict(list)
    sharded = {name: value for name, value in state.items() if isinstance(value, DTensor)}
    for name in sorted(sharded, key=lambda name: (sharded[name].numel(), name)):
        by_layout[sharded[name].device_mesh, sharded[name].placements].append(name)
    left: set[str] = set()
    among = set(alike)
    for layout, names in by_layout.items():
        holders = [other for other in _holders(*layout) if other in among]
        left |= set(names) - set(names[holders.index(rank) :: len(holders)])
    return left


def _holders(mesh: DeviceMesh, placements: tuple[Placement, ...]) -> list[int]:
    """Return the ranks with the same shard as this one of tensors that are laid out like this."""
    places = zip(placements, mesh.get_coordinate() or (), strict=True)
    index = tuple(slice(None) if isinstance(how, Replicate) else own for how, own in places)
    return mesh.mesh[index].flatten().tolist()


def _is_shared(item: WriteItem) -> bool:
    size: Any = item.tensor_storage_size()
    return item.type == WriteItemType.BYTE_IO or (
        item.type == WriteItemType.TENSOR and size <= _SMALL
    )
