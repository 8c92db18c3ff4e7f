"""Records the communication between ranks: every collective, its group and its bytes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._pytree import tree_leaves

from torchtitan.distributed.ring_attention import sees_rings

from .recorder import Recorder


@dataclass(frozen=True)
class Collective:
    """One call on this rank."""

    kind: str
    """`all_gather`, `reduce_scatter`, `all_reduce`, `all_to_all`, `broadcast`, `send`."""
    group: str
    """Name of the group of ranks."""
    ranks: int
    """Ranks that take part."""
    payload: int
    """Bytes of the input or the output, whichever is larger."""
    to_others: int | None = None
    """Bytes of an uneven all-to-all that this rank sends to other ranks, or receives from them,
    whichever is more."""

    @property
    def sent(self) -> float:
        """Bytes that this rank sends in a ring, the bandwidth-optimal algorithm (Patarasuk and
        Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009).
        """
        if self.to_others is not None:
            return self.to_others
        others = (self.ranks - 1) / self.ranks
        factor = {"all_reduce": 2 * others, "send": 1.0, "broadcast": 1.0}
        return self.payload * factor.get(self.kind, others)


_KINDS = {
    kind.replace("_", ""): kind
    for kind in ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast", "send")
}
"""Part of an operation's name, without underscores -> kind: `c10d::_allgather_base_`, `isend`."""

_KINDS_OF_DATA_PARALLEL = ("all_gather", "reduce_scatter", "all_reduce")

DATA_PARALLEL = ("fsdp", "expert_dp", "dp_replicate", "expert_dp_replicate")
"""Groups of FSDP and DDP."""


@sees_rings
class CollectiveRecorder(Recorder):
    """Records every collective of this process in `collectives`, while it is entered.

    Code compiled by inductor is not seen.

    Args:
        groups: name -> group, as returned by `ParallelDims.groups()`. Of equal groups, FSDP and DDP
            have those of `DATA_PARALLEL`, and all else the first of the others. A group of the
            ranks of several is named after them, such as `fsdp x tp`.
    """

    def __init__(self, groups: Mapping[str, dist.ProcessGroup]) -> None:
        super().__init__()
        self.collectives: list[Collective] = []
        self.groups: dict[str, list[int]] = {}
        """Name -> ranks, of all groups that are known so far."""
        self._names: dict[str, list[str]] = defaultdict(list)
        for name, group in groups.items():
            self._names[group.group_name].append(name)
            self.groups[name] = dist.get_process_group_ranks(group)

    def record(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        if func.namespace not in ("c10d", "_c10d_functional"):
            return
        name = func._opname.replace("_", "")
        kind = next((kind for part, kind in _KINDS.items() if part in name), None)
        if kind is None:
            return
        group = _group_of(args)
        if kind == "all_to_all" and _is_step_of_ring(args, group.rank()):
            kind = "send"
        if group.group_name not in self._names:
            self._add(group)
        names = self._names[group.group_name]
        # Only FSDP and DDP call these directly; others use functional collectives.
        of_data = func.namespace == "c10d" and kind in _KINDS_OF_DATA_PARALLEL
        name = next((n for n in names if (n in DATA_PARALLEL) == of_data), names[0])
        sizes = [
            sum(t.nbytes for t in tree_leaves(side) if isinstance(t, torch.Tensor))
            for side in (args[:1], args[1:2], result)
        ]
        to_others = _bytes_of_others(args, group.rank()) if kind == "all_to_all" else None
        self.collectives.append(Collective(kind, name, group.size(), max(sizes), to_others))

    def _add(self, group: dist.ProcessGroup) -> None:
        """Name a group after those that span its ranks."""
        ranks = dist.get_process_group_ranks(group)
        inside = [name for name, some in self.groups.items() if 1 < len(some) <= len(ranks)]
        inside.sort(key=lambda name: -self.groups[name][-1])  # outermost first, as in meshes
        spanning = (
            names
            for count in range(1, len(inside) + 1)
            for names in combinations(inside, count)
            if _span([self.groups[name] for name in names], ranks)
        )
        name = " x ".join(next(spanning, [f"{len(ranks)} ranks"]))
        self._names[group.group_name].append(name)
        self.groups.setdefault(name, ranks)


def _span(groups: Sequence[list[int]], ranks: list[int]) -> bool:
    """Whether the ranks are the product of these groups of this rank."""
    if math.prod(map(len, groups)) != len(ranks):
        return False
    own = dist.get_rank()
    steps = product(*([rank - own for rank in group] for group in groups))
    return sorted(own + sum(step) for step in steps) == sorted(ranks)


def _splits(args: Any) -> list[list[int]]:
    """Return the shares of an all-to-all, one for each rank: what is received, and what is sent."""
    return [a for a in args if isinstance(a, list) and a and isinstance(a[0], int)]


def _is_step_of_ring(args: Any, rank: int) -> bool:
    """Whether this rank sends to one other, and receives from one other."""
    splits = _splits(args)
    return bool(splits) and all(
        len(sizes) - sizes.count(0) == 1 and not sizes[rank] for sizes in splits
    )


def _bytes_of_others(args: Any, rank: int) -> int | None:
    """Return the larger one of what this rank sends and receives; None if shares are equal."""
    splits = _splits(args)
    if all(len(set(sizes)) <= 1 for sizes in splits):
        return None
    row = next(t for t in tree_leaves(args) if isinstance(t, torch.Tensor))
    of_row = row.element_size() * math.prod(row.shape[1:])
    return of_row * max(sum(sizes) - sizes[rank] for sizes in splits)


def _group_of(args: Any) -> dist.ProcessGroup:
    for value in reversed(args):
        if isinstance(value, dist.ProcessGroup):
            return value
        if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
            return dist.ProcessGroup.unbox(value)
        if isinstance(value, str):
            try:
                return _resolve_process_group(cast(Any, value))
            except (RuntimeError, ValueError):  # another string argument, such as the reduction
                continue
    raise AssertionError("a collective without a process group")
