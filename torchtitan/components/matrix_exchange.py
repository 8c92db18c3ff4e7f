"""Gather sharded matrices, one on each rank, and scatter the results computed from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import chain
from operator import itemgetter
from typing import NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

_functional = torch.ops._c10d_functional

T = TypeVar("T")
Shape = tuple[int, int]


class Dim(NamedTuple):
    """A dimension of a mesh along which matrices are exchanged."""

    number: int
    has_copies: bool
    """Whether its ranks have the same, rather than parts."""


class Cut(NamedTuple):
    """How the ranks of one dimension hold a matrix, or their common part of one."""

    whole: Shape
    """Shape of what they have together."""
    dim: int | None
    """What they share out: 0, the rows; 1, the columns; None: each has all."""

    def lengths(self, ranks: int) -> tuple[int, ...]:
        """Return the rows or columns that each rank has: of PyTorch's chunks, maybe none."""
        return _chunks(self.whole[cast(int, self.dim)], ranks)

    def with_length(self, length: int) -> Shape:
        """Return the shape of a part with this many of the rows or columns."""
        rows, columns = self.whole
        return (length, columns) if self.dim == 0 else (rows, length)


class _Ranks(NamedTuple):
    """The ranks that differ from this one in one dimension of the mesh."""

    group: dist.ProcessGroup
    size: int
    own: int
    has_copies: bool

    def deal(self, items: Sequence[T]) -> list[list[T]]:
        """Give the items to the ranks in turn, and return those of each rank."""
        return [list(items[rank :: self.size]) for rank in range(self.size)]

    def dealt(self, items: Sequence[T]) -> list[T]:
        """Return the items that `deal` gives to this rank."""
        return list(items[self.own :: self.size])

    def own_shape(self, cut: Cut) -> Shape:
        """Return the shape of this rank's part."""
        return cut.with_length(cut.lengths(self.size)[self.own])


class MatrixExchange:
    """Applies functions to whole matrices, which the ranks of a mesh share out among themselves.

    Along one dimension of the mesh after the other, matrices are dealt to the ranks that have parts
    of them, and each rank gathers its own ones. With two ranks that each hold half of the matrices
    A and B:

        rank 0:  A0 B0  --->  A0 A1  compute A  --->  A0 B0
        rank 1:  A1 B1  --->  B0 B1  compute B  --->  A1 B1

    So the ranks work in parallel, each rank holds one whole matrix at a time, and it moves about as
    many bytes as it owns; an all-gather would move all bytes to all ranks. In 8 x 128 ranks, each
    talks to 7 and to 127 others, not to 1,023.

    Args:
        mesh: all its ranks construct and use the exchange together.
        dims: as `exchanged_dims` returns them.
    """

    def __init__(self, mesh: DeviceMesh, dims: Sequence[Dim]) -> None:
        self._dims = dims
        self._device = mesh.device_type
        self._levels = [
            _Ranks(mesh.get_group(n), mesh.size(n), mesh.get_local_rank(n), has_copies)
            for n, has_copies in dims
        ]
        self.ranks = math.prod(ranks.size for ranks in self._levels)
        """Number of matrices that can be processed at once."""

    def layout(self, matrix: DTensor) -> list[Cut]:
        """Return how the ranks of each of the dimensions hold a matrix, or each one of a stack."""
        leading = matrix.ndim - 2
        whole, cuts = cast(Shape, tuple(matrix.shape[leading:])), []
        for (number, has_copies), ranks in zip(self._dims[::-1], self._levels[::-1], strict=True):
            if has_copies:
                cuts.append(Cut(whole, None))
            else:
                cut = Cut(whole, cast(Shard, matrix.placements[number]).dim - leading)
                cuts.append(cut)
                whole = ranks.own_shape(cut)
        return cuts[::-1]

    def apply(
        self,
        function: Callable[[torch.Tensor], torch.Tensor],
        layouts: Sequence[list[Cut]],
        local: Sequence[torch.Tensor],
    ) -> list[torch.Tensor]:
        """Return this rank's part of `function(matrix)` for each matrix.

        Args:
            function: must keep shape and dtype.
            layouts: of at most `ranks` matrices.
            local: this rank's part of each matrix's values, `[rows, columns]`, all of one dtype.
        """
        parts = [values.to(self._device) for values in local]  # from the host, if offloaded
        return self._apply(function, layouts, parts, level=0)

    def _apply(
        self,
        function: Callable[[torch.Tensor], torch.Tensor],
        layouts: Sequence[list[Cut]],
        parts: list[torch.Tensor],
        level: int,
    ) -> list[torch.Tensor]:
        """Do the same with parts that are gathered along the dimensions before `level`."""
        if not parts:  # nor have the ranks that this one would exchange with
            return []
        if level == len(self._levels):
            return [function(parts.pop())]
        ranks, empty = self._levels[level], parts[0].new_empty(0)
        cuts = [layout[level] for layout in layouts]
        own = ranks.dealt(parts) if ranks.has_copies else _gather(parts, cuts, ranks, empty)
        parts.clear()  # the function needs their memory
        results = self._apply(function, ranks.dealt(layouts), own, level + 1)
        send_back = _copy if ranks.has_copies else _scatter
        return send_back(results, cuts, ranks, empty)


def exchanged_dims(matrix: DTensor) -> tuple[Dim, ...]:
    """Return the dimensions of the mesh along which a matrix, or each one of a stack, is exchanged.

    In an order that undoes one cut after the other. Copies come first: then one of them gathers the
    parts. Dimensions along which ranks have other matrices of a stack are left out.
    """
    dims = [
        Dim(number, place.is_replicate())
        for number, place in enumerate(matrix.placements)
        if matrix.device_mesh.size(number) > 1
        and (place.is_replicate() or cast(Shard, place).dim >= matrix.ndim - 2)
    ]
    plain = [place.dim for place in matrix.placements if type(place) is Shard]
    if len(set(plain)) < len(plain):  # the later one cuts the parts of the earlier one
        dims.reverse()
    # FSDP's strided shards, of the parts that tensor parallelism has made, are no `Shard`s.
    dims.sort(key=lambda dim: (not dim.has_copies, type(matrix.placements[dim.number]) is Shard))
    return tuple(dims)


def _gather(
    parts: list[torch.Tensor], cuts: list[Cut], ranks: _Ranks, empty: torch.Tensor
) -> list[torch.Tensor]:
    """Return the matrices that are dealt to this rank, given its part of each."""
    own = ranks.dealt(cuts)
    shapes = [map(cut.with_length, cut.lengths(ranks.size)) for cut in own]
    received = _all_to_all(ranks.deal(parts), _by_rank(shapes, ranks), ranks, empty)
    return [torch.cat(received[i :: len(own)], cast(int, cut.dim)) for i, cut in enumerate(own)]


def _scatter(
    results: list[torch.Tensor], cuts: list[Cut], ranks: _Ranks, empty: torch.Tensor
) -> list[torch.Tensor]:
    """Return this rank's part of each matrix, given those that are dealt to it."""
    pieces = [
        result.split(cut.lengths(ranks.size), cast(int, cut.dim))
        for cut, result in zip(ranks.dealt(cuts), results, strict=True)
    ]
    shapes = ranks.deal(list(map(ranks.own_shape, cuts)))
    return _in_order(_all_to_all(_by_rank(pieces, ranks), shapes, ranks, empty), ranks)


def _copy(
    results: list[torch.Tensor], cuts: list[Cut], ranks: _Ranks, empty: torch.Tensor
) -> list[torch.Tensor]:
    """Return all matrices, given those that are dealt to this rank."""
    shapes = ranks.deal([cut.whole for cut in cuts])
    most = max(map(_size, shapes))
    values = _flat(results, empty)
    values = F.pad(values, (0, most - len(values)))
    # Not `all_gather_into_tensor` of torch.distributed, which torch 2.13 renames.
    gathered = _functional.all_gather_into_tensor(values, ranks.size, ranks.group.group_name)
    received = _functional.wait_tensor(gathered).view(ranks.size, most)
    dealt = [_views(values, of_rank) for values, of_rank in zip(received, shapes, strict=True)]
    return _in_order(list(chain.from_iterable(dealt)), ranks)


def _all_to_all(
    send: Sequence[Sequence[torch.Tensor]],
    shapes: Sequence[Sequence[Shape]],
    ranks: _Ranks,
    empty: torch.Tensor,
) -> list[torch.Tensor]:
    """Send the tensors `send[k]` to rank `k`, and return those of `shapes[k]` that it sends."""
    values = _flat(chain.from_iterable(send), empty)
    sent = [sum(part.numel() for part in to_rank) for to_rank in send]
    sizes = list(map(_size, shapes))
    received = empty.new_empty(sum(sizes))
    dist.all_to_all_single(received, values, sizes, sent, group=ranks.group)
    return _views(received, list(chain.from_iterable(shapes)))


def _by_rank(of_matrices: Sequence[Iterable[T]], ranks: _Ranks) -> Sequence[Sequence[T]]:
    """Return what each rank has of each matrix, given what it has of each of them, maybe none."""
    return list(zip(*of_matrices, strict=True)) or [()] * ranks.size


def _in_order(dealt: Sequence[torch.Tensor], ranks: _Ranks) -> list[torch.Tensor]:
    """Return tensors, given rank by rank, in the order in which `deal` gave them to the ranks."""
    numbers = chain.from_iterable(ranks.deal(range(len(dealt))))
    return [tensor for _, tensor in sorted(zip(numbers, dealt, strict=True), key=itemgetter(0))]


def _flat(tensors: Iterable[torch.Tensor], empty: torch.Tensor) -> torch.Tensor:
    return torch.cat([empty, *(tensor.flatten() for tensor in tensors)])


def _size(shapes: Iterable[Shape]) -> int:
    return sum(rows * columns for rows, columns in shapes)


def _views(values: torch.Tensor, shapes: Sequence[Shape]) -> list[torch.Tensor]:
    """Return tensors of these shapes, which follow each other at the start of `values`."""
    sizes = [rows * columns for rows, columns in shapes]
    pieces = values.split([*sizes, len(values) - sum(sizes)])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=False)]


@cache
def _chunks(length: int, count: int) -> tuple[int, ...]:
    """Return the lengths into which PyTorch cuts `length` for a number of ranks."""
    each = -(-length // count)
    return tuple(max(0, min(each, length - each * rank)) for rank in range(count))
