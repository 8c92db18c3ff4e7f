"""Sums of a few numbers over all ranks, on the host, at each step."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

_FEW = 16
"""Ranks up to which a ring is as good."""


class HostSum:
    """Adds up small tensors on the host. All ranks make one, and call it, together.

    Make it before groups that only some of the ranks are in: PyTorch names groups by the number of
    those that a rank has.

    Gloo hands a tensor on along a ring of all n ranks: 2 (n - 1) messages one after the other,
    a second or two with 10,000 ranks. Here the ranks stand in rows and columns, and add up along
    the rows and then along the columns: 4 (sqrt(n) - 1) messages, if n is a square.
    """

    def __init__(self) -> None:
        world_size, rank = dist.get_world_size(), dist.get_rank()
        self._groups: list[dist.ProcessGroup | None] = [None]
        rows, columns = grid(world_size)
        if rows > 1:
            row = range(rank // columns * columns, (rank // columns + 1) * columns)
            column = range(rank % columns, world_size, columns)
            self._groups = [
                # Only those in a group wait for each other: there are many groups.
                dist.new_group(list(ranks), backend="gloo", use_local_synchronization=True)
                for ranks in (row, column)
            ]

    def __call__(self, tensor: torch.Tensor) -> None:
        """Replace `tensor` by its sum over all ranks, the same to the last bit on each."""
        for group in self._groups:
            dist.all_reduce(tensor, group=group)


def grid(ranks: int) -> tuple[int, int]:
    """Rows and columns, their product `ranks`, as near to a square as they can be."""
    if ranks <= _FEW:
        return 1, ranks
    rows = next(n for n in range(math.isqrt(ranks), 0, -1) if ranks % n == 0)
    return rows, ranks // rows
