"""Computes which parts of matrices the ranks have, which they tell each other in a real run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from torchtitan.components import matrix_exchange
from torchtitan.components.matrix_exchange import MatrixExchange

_group_of_mesh = matrix_exchange._group


@contextmanager
def exchanging_without_ranks() -> Iterator[list[DTensor]]:
    """Let `MatrixExchange` work on fake tensors in a `fake_world`, within the context.

    Yields:
        The matrices exchanged so far.
    """
    exchanged: list[DTensor] = []

    def table(matrices: Sequence[DTensor], group: dist.ProcessGroup) -> np.ndarray:
        exchanged.extend(matrices)
        return table_of_parts(matrices)

    def group(mesh: DeviceMesh) -> dist.ProcessGroup:
        with unset_fake_temporarily():  # it reads the mesh's tensor of ranks
            return _group_of_mesh(mesh)

    with (
        patch.object(matrix_exchange, "_table_of_parts", table),
        patch.object(matrix_exchange, "_group", group),
    ):
        yield exchanged


@contextmanager
def leaving_out_exchanges() -> Iterator[None]:
    """Make `MatrixExchange` return what it is given, within the context."""

    def apply(
        exchange: MatrixExchange,
        function: Callable[[torch.Tensor], torch.Tensor],
        matrices: Sequence[DTensor],
        local: Sequence[torch.Tensor],
    ) -> list[torch.Tensor]:
        return list(local)

    with patch.object(MatrixExchange, "apply", apply):
        yield


def table_of_parts(matrices: Sequence[DTensor]) -> np.ndarray:
    """Return what `MatrixExchange` gathers, without communication: `[rank, matrix, 5]`.

    Shards are those that FSDP, tensor and expert parallelism make. `MatrixExchange` does not rely
    on that, as an author's own may be others.
    """
    mesh = matrices[0].device_mesh
    with unset_fake_temporarily():
        order = np.argsort(mesh.mesh.flatten().numpy())  # ranks of a group are in order
    coordinates = np.stack(np.unravel_index(order, mesh.shape))
    of_layout = functools.cache(functools.partial(_parts_of_ranks, mesh.shape, coordinates))
    return np.stack([of_layout(m.shape, m.placements) for m in matrices], axis=1)


def _parts_of_ranks(
    mesh_shape: tuple[int, ...],
    coordinates: np.ndarray,
    shape: torch.Size,
    placements: tuple[Placement, ...],
) -> np.ndarray:
    """Return the parts of a matrix, `[rank, 5]`. Args: coordinates: in the mesh, `[dim, rank]`."""
    ranks = coordinates.shape[1]
    replica = np.zeros(ranks, dtype=np.int64)
    offsets = np.zeros((ranks, 2), dtype=np.int64)
    sizes = np.tile(np.array(shape), (ranks, 1))
    # FSDP's strided shards are of what tensor parallelism has left, so they come last.
    dims = zip(placements, coordinates, mesh_shape, strict=True)
    for place, number, size in sorted(dims, key=lambda dim: type(dim[0]) not in (Replicate, Shard)):
        if place.is_replicate():
            replica = replica * size + number
            continue
        dim = cast(Shard, place).dim
        each = -(-sizes[:, dim] // size)
        begin = np.minimum(number * each, sizes[:, dim])
        offsets[:, dim] += begin
        sizes[:, dim] = np.minimum(each, sizes[:, dim] - begin)
    return np.column_stack([replica, offsets, sizes])
