"""Records the communication between ranks: every collective, its group and its bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
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

    @property
    def sent(self) -> float:
        """Bytes that this rank sends in a ring, the bandwidth-optimal algorithm (Patarasuk and
        Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009).
        """
        others = (self.ranks - 1) / self.ranks
        factor = {"all_reduce": 2 * others, "send": 1.0, "broadcast": 1.0}
        return self.payload * factor.get(self.kind, others)


_KINDS = {
    "c10d::_allgather_base_": "all_gather",
    "c10d::allgather_": "all_gather",
    "c10d::allgather_into_tensor_coalesced_": "all_gather",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "c10d::reduce_scatter_": "reduce_scatter",
    "c10d::reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "c10d::allreduce_": "all_reduce",
    "c10d::alltoall_base_": "all_to_all",
    "c10d::alltoall_": "all_to_all",
    "c10d::broadcast_": "broadcast",
    "c10d::send": "send",
    "_c10d_functional::all_gather_into_tensor": "all_gather",
    "_c10d_functional::all_gather_into_tensor_out": "all_gather",
    "_c10d_functional::all_gather_into_tensor_coalesced": "all_gather",
    "_c10d_functional::reduce_scatter_tensor": "reduce_scatter",
    "_c10d_functional::reduce_scatter_tensor_coalesced": "reduce_scatter",
    "_c10d_functional::all_reduce": "all_reduce",
    "_c10d_functional::all_reduce_": "all_reduce",
    "_c10d_functional::all_to_all_single": "all_to_all",
    "_c10d_functional::broadcast": "broadcast",
    "_c10d_functional::isend": "send",
}

_KINDS_OF_DATA_PARALLEL = ("all_gather", "reduce_scatter", "all_reduce")

DATA_PARALLEL = ("fsdp", "expert_dp", "dp_replicate", "expert_dp_replicate")
"""Groups of FSDP and DDP."""


@sees_rings
class CollectiveRecorder(Recorder):
    """Records every collective of this process in `collectives`, while it is entered.

    Code compiled by inductor is not seen.

    Args:
        groups: name -> group, as returned by `ParallelDims.groups()`. Of equal groups, FSDP and DDP
            have those of `DATA_PARALLEL`, and all else the first of the others.
    """

    def __init__(self, groups: Mapping[str, dist.ProcessGroup]) -> None:
        super().__init__()
        self.collectives: list[Collective] = []
        self._names: dict[str, list[str]] = defaultdict(list)
        for name, group in groups.items():
            self._names[group.group_name].append(name)

    def record(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        kind = _KINDS.get(func._schema.name)
        if kind is None:
            return
        if kind == "all_to_all" and _has_one_receiver(args):
            kind = "send"  # one step around a ring
        group = _group_of(args)
        names = self._names.get(group.group_name, [group.group_name])
        # Only FSDP and DDP call these directly; others use functional collectives.
        of_data = func.namespace == "c10d" and kind in _KINDS_OF_DATA_PARALLEL
        name = next((n for n in names if (n in DATA_PARALLEL) == of_data), names[0])
        sizes = [
            sum(t.nbytes for t in tree_leaves(side) if isinstance(t, torch.Tensor))
            for side in (args[:1], args[1:2], result)
        ]
        self.collectives.append(Collective(kind, name, group.size(), max(sizes)))


def _has_one_receiver(args: Any) -> bool:
    """Whether all shares of this all-to-all, one for each rank, are empty except one."""
    return any(isinstance(a, list) and len(a) - a.count(0) == 1 < len(a) for a in args)


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
