"""Sum a few numbers over all ranks, on the host, at each step."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

_SUM = dist.ReduceOp.SUM
_FEW = 16
"""Number of ranks up to which a ring is as good."""


class HostSum:
    """Sums small tensors on the host. All ranks construct it, and call it, together.

    Construct it before groups that only some of the ranks are in: PyTorch names a group by the
    number of groups that the rank has already.

    Gloo passes a tensor along a ring of all n ranks: 2 (n - 1) messages one after the other, a
    second or two with 10,000 ranks. Here the ranks stand in rows: each row sums, the first ranks of
    the rows sum their results, and broadcast to their rows, with about 4 sqrt(n) messages.
    """

    def __init__(self) -> None:
        self._row: dist.ProcessGroup | None = None
        rank, rows = dist.get_rank(), rows_of(dist.get_world_size())
        row = next(row for row in rows if rank in row)
        self._several, self._head = len(rows) > 1, row[0]
        if self._several:
            heads = [row[0] for row in rows]
            # Other ranks get a group of their own instead, so that all have equally many groups.
            across = heads if rank == self._head else [rank]
            self._row, self._across = (
                # Only the ranks of a group wait for each other: there are many groups.
                dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
                for ranks in (list(row), across)
            )

    def __call__(self, tensor: torch.Tensor, op: dist.ReduceOp.RedOpType = _SUM) -> None:
        """Replace `tensor` by its sum over all ranks, the same to the last bit on each.

        `op`: the reduction to use instead of the sum.
        """
        dist.all_reduce(tensor, op, group=self._row)
        if self._several:
            dist.all_reduce(tensor, op, group=self._across)
            dist.broadcast(tensor, self._head, group=self._row)


def rows_of(ranks: int) -> list[range]:
    """Return the ranks of each row: one row of few ranks, else about as many rows as columns."""
    rows = math.isqrt(ranks) if ranks > _FEW else 1
    return [range(row * ranks // rows, (row + 1) * ranks // rows) for row in range(rows)]


def all_alike(sums: list[int], ranks: int) -> bool:
    """Return whether a number and its square, each summed over `ranks`, are equal on all ranks."""
    total, squares = sums
    return ranks * squares == total**2  # by Cauchy and Schwarz, only if all numbers are equal
