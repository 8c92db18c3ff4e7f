"""Sum a few numbers over all ranks, on the host, at each step."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch
import torch.distributed as dist

_SUM = dist.ReduceOp.SUM
_Combine = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_COMBINE: dict[dist.ReduceOp.RedOpType, _Combine] = {
    dist.ReduceOp.SUM: torch.add,
    dist.ReduceOp.MAX: torch.maximum,
    dist.ReduceOp.MIN: torch.minimum,
}
_FEW = 16
"""Number of ranks up to which a ring is as good."""
_seconds = 0.0


def sum_over_ranks(
    tensor: torch.Tensor,
    op: dist.ReduceOp.RedOpType = _SUM,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Replace a small host tensor by its sum over all ranks, the same to the last bit on each.

    Gloo passes a tensor along a ring of all n ranks: 2 (n - 1) messages one after the other, a
    second or two with 10,000 ranks. Here pairs of ranks exchange their sums: first neighbours, then
    pairs of pairs and so on (recursive doubling), with 2 log2(n) messages. The ranks beyond a power
    of two give their tensor to another rank, and receive the result from it.

    Args:
        op: the reduction to use instead of the sum: `MAX` or `MIN`.
        group: the ranks; None: all.
    """
    global _seconds
    if dist.get_world_size(group) <= _FEW:
        dist.all_reduce(tensor, op, group=group)
        return
    begin = perf_counter()
    _sum_by_pairs(tensor, _COMBINE[op], group)
    _seconds += perf_counter() - begin


def seconds_between_pairs() -> float:
    """Return the time that this process has spent in sums by pairs of ranks.

    Observers of collectives cannot tell: they would wait for a message that gloo sends once twice.
    """
    return _seconds


def _sum_by_pairs(tensor: torch.Tensor, combine: _Combine, group: dist.ProcessGroup | None) -> None:
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    doubled = 1 << (ranks.bit_length() - 1)
    other = tensor.clone()
    if rank >= doubled:
        dist.send(tensor, group=group, group_dst=rank - doubled)
        dist.recv(tensor, group=group, group_src=rank - doubled)
        return
    if rank + doubled < ranks:
        dist.recv(other, group=group, group_src=rank + doubled)
        tensor.copy_(combine(tensor, other))
    distance = 1
    while distance < doubled:
        partner = rank ^ distance
        # Not both at once: gloo sends only what its receiver waits for.
        if rank < partner:
            dist.send(tensor, group=group, group_dst=partner)
            dist.recv(other, group=group, group_src=partner)
        else:
            dist.recv(other, group=group, group_src=partner)
            dist.send(tensor, group=group, group_dst=partner)
        # a + b is b + a, so both have the same bits.
        tensor.copy_(combine(tensor, other))
        distance *= 2
    if rank + doubled < ranks:
        dist.send(tensor, group=group, group_dst=rank + doubled)


def all_alike(sums: list[int], ranks: int) -> bool:
    """Return whether a number and its square, each summed over `ranks`, are equal on all ranks."""
    total, squares = sums
    return ranks * squares == total**2  # by Cauchy and Schwarz, only if all numbers are equal
