"""Gather sharded matrices, one on each rank, and scatter the results computed from them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from torchtitan.distributed.dtensor import offsets_of_all


class Part(NamedTuple):
    """One rank's part of a matrix."""

    replica: int
    """Index of the copy of the matrix that the part belongs to."""
    row: int
    column: int
    rows: int
    columns: int

    @property
    def size(self) -> int:
        return self.rows * self.columns

    def of(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return this part, `[rows, columns]`, of the whole matrix, as a view."""
        rows = slice(self.row, self.row + self.rows)
        return matrix[rows, self.column : self.column + self.columns]


class MatrixExchange:
    """Applies functions to whole matrices with two all-to-alls among the ranks of their mesh.

    Rank `k` receives the parts of the `k`-th matrix, computes, and sends each rank its part of the
    result. With two ranks that each hold half of the matrices A and B:

        rank 0:  A0 B0  --->  A0 A1  compute A  --->  A0 B0
        rank 1:  A1 B1  --->  B0 B1  compute B  --->  A1 B1

    So the ranks work in parallel, each rank holds one whole matrix at a time, and it moves about as
    many bytes as it owns; an all-gather would move all bytes to all ranks.

    Args:
        matrices: the matrices to exchange, DTensors on one mesh, sharded or replicated along its
            dimensions. All ranks of the mesh construct and use the exchange together.
    """

    def __init__(self, matrices: Sequence[DTensor]) -> None:
        mesh = matrices[0].device_mesh
        self.ranks = mesh.size()
        """Number of matrices that can be processed at once."""
        self._group = _group(mesh)
        self._rank = dist.get_rank(self._group)
        self._device = mesh.device_type
        self._table = _table_of_parts(matrices, self._group)
        self._index = {id(matrix): number for number, matrix in enumerate(matrices)}

    def apply(
        self,
        function: Callable[[torch.Tensor], torch.Tensor],
        matrices: Sequence[DTensor],
        local: Sequence[torch.Tensor],
    ) -> list[torch.Tensor]:
        """Return this rank's part of `function(matrix)` for each matrix.

        Args:
            function: must keep shape and dtype.
            matrices: at most `ranks` of the matrices given at construction; only their layout is
                used.
            local: this rank's part of each matrix's values, `[rows, columns]`, all of one dtype.
        """
        numbers = [self._index[id(matrix)] for matrix in matrices]
        own = _parts(self._table[self._rank, numbers])
        of_owners = _parts(self._table[range(len(numbers)), numbers])
        # Each rank's part of the matrix that this rank processes, if there is one for it.
        mine = _parts(self._table[:, numbers[self._rank]]) if self._rank < len(numbers) else []
        local = [values.to(self._device) for values in local]  # from the host, if offloaded
        nothing = local[0].new_empty(0)

        # A matrix is put together from the ranks of one replica: that of the rank it goes to.
        send = [
            values if part.replica == of_owner.replica else nothing
            for part, of_owner, values in zip(own, of_owners, local, strict=True)
        ]
        sizes = [part.size if part.replica == mine[self._rank].replica else 0 for part in mine]
        received = self._all_to_all(send, sizes)
        results = [nothing]
        if mine:
            whole = nothing.new_empty(matrices[self._rank].shape)
            for part, size, values in zip(mine, sizes, received, strict=True):
                if size:
                    part.of(whole).copy_(values.view(part.rows, part.columns))
            del received, values  # the function needs their memory
            whole = function(whole)
            results = [part.of(whole) for part in mine]

        returned = self._all_to_all(results, [part.size for part in own])
        # Ranks without a matrix send empty results, which `zip` drops.
        return [values.view_as(old) for values, old in zip(returned, local, strict=False)]

    def _all_to_all(
        self, send: Sequence[torch.Tensor], sizes: Sequence[int]
    ) -> Sequence[torch.Tensor]:
        """Send `send[k]` to rank `k` and receive `sizes[k]` values from it; further ranks: none."""
        sent = [values.numel() for values in send]
        idle = [0] * (self.ranks - len(send)), [0] * (self.ranks - len(sizes))
        values = torch.cat([values.flatten() for values in send])
        received = values.new_empty(sum(sizes))
        dist.all_to_all_single(
            received, values, [*sizes, *idle[1]], [*sent, *idle[0]], group=self._group
        )
        return received.split([*sizes, *idle[1]])


def _table_of_parts(matrices: Sequence[DTensor], group: dist.ProcessGroup) -> np.ndarray:
    """Return the numbers of each `Part`: `[rank, matrix, 5]`.

    Not `Part`s: of hundreds of matrices on thousands of ranks, they would take a gigabyte.
    """
    parts = map(_own_part, matrices, offsets_of_all(matrices))
    device = matrices[0].device_mesh.device_type
    own = torch.tensor(list(parts), dtype=torch.int32, device=device)
    table = own.new_empty(group.size(), *own.shape)
    with warnings.catch_warnings():  # torch 2.13 renames it; 2.11 lacks the new name
        warnings.simplefilter("ignore", FutureWarning)
        dist.all_gather_into_tensor(table.flatten(0, 1), own, group=group)
    return table.cpu().numpy()


def _parts(table: np.ndarray) -> list[Part]:
    return [Part(*numbers) for numbers in table.tolist()]


def _own_part(matrix: DTensor, offsets: tuple[int, ...]) -> Part:
    mesh = matrix.device_mesh
    replica = 0
    for dim, placement in enumerate(matrix.placements):
        if isinstance(placement, Replicate):
            replica = replica * mesh.size(dim) + mesh.get_local_rank(dim)
    return Part(replica, *offsets, *matrix.to_local().shape)


def _group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """Return the group of all ranks of a mesh.

    Only these ranks call this, as ranks of other meshes may have no matrices.
    """
    if mesh.ndim == 1:
        return mesh.get_group()
    ranks = mesh.mesh.flatten().tolist()
    if len(ranks) == dist.get_world_size():
        return cast(dist.ProcessGroup, dist.group.WORLD)
    return dist.new_group(ranks, use_local_synchronization=True)
