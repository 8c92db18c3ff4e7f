"""Computes which parts of matrices the ranks have, which they tell each other in a real run."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

from torchtitan.components import matrix_exchange
from torchtitan.components.matrix_exchange import Part

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
        return table_of_parts(matrices, group)

    def group(mesh: DeviceMesh) -> dist.ProcessGroup:
        with unset_fake_temporarily():  # it reads the mesh's tensor of ranks
            return _group_of_mesh(mesh)

    with (
        patch.object(matrix_exchange, "_table_of_parts", table),
        patch.object(matrix_exchange, "_group", group),
    ):
        yield exchanged


def table_of_parts(matrices: Sequence[DTensor], group: dist.ProcessGroup) -> np.ndarray:
    """Return what `MatrixExchange` gathers, without communication: `[rank, matrix, 5]`.

    It takes seconds for thousands of ranks, so only a plan does this.
    """
    mesh = matrices[0].device_mesh
    with unset_fake_temporarily():
        places = dict(zip(mesh.mesh.flatten().tolist(), np.ndindex(mesh.shape), strict=True))
        coordinates = [places[rank] for rank in dist.get_process_group_ranks(group)]
        of_layout = functools.cache(functools.partial(_parts_of_ranks, mesh.shape, coordinates))
        return np.stack([of_layout(m.shape, m.placements) for m in matrices], axis=1)


def _parts_of_ranks(
    mesh_shape: tuple[int, ...],
    coordinates: Sequence[tuple[int, ...]],
    shape: torch.Size,
    placements: tuple[Placement, ...],
) -> np.ndarray:
    """Args: coordinates: of each rank in the mesh."""
    replicates = [isinstance(placement, Replicate) for placement in placements]
    sizes = [size if same else 1 for size, same in zip(mesh_shape, replicates, strict=True)]

    @functools.cache
    def of_shard(place: tuple[int, ...]) -> tuple[int, ...]:
        local, offsets = _compute_local_shape_and_global_offset(
            shape, mesh_shape, list(place), placements
        )
        return *offsets, *local

    found = []
    for place in coordinates:
        pairs = list(zip(place, replicates, strict=True))
        replica = np.ravel_multi_index([c if same else 0 for c, same in pairs], sizes)
        shard = of_shard(tuple(0 if same else c for c, same in pairs))
        found.append(Part(int(replica), *shard))
    return np.array(found, dtype=np.int32)
