"""The whole of a DTensor, and this rank's part of it."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a DTensor; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return a DTensor gathered on all ranks of its mesh; any other tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_gradient(param: torch.Tensor) -> torch.Tensor:
    """Give the gradient of a parameter the parameter's placements, and return this rank's part.

    Before, ranks may hold terms of the gradient of a norm's weight, which each applied to its part
    of the sequence, and the whole gradient of an embedding that is split by `RowwiseParallel`.
    """
    grad = cast(torch.Tensor, param.grad)
    if isinstance(grad, DTensor) and grad.placements != cast(DTensor, param).placements:
        grad = param.grad = grad.redistribute(placements=cast(DTensor, param).placements)
    return local_tensor(grad)


def replicas_of(value: Any) -> dist.ProcessGroup | None:
    """Return the ranks of `dp_replicate` (HSDP, DDP) that have the same part of a DTensor."""
    if not isinstance(value, DTensor):
        return None
    names = value.device_mesh.mesh_dim_names or ()
    if "dp_replicate" not in names:
        return None
    dim = names.index("dp_replicate")
    same = isinstance(value.placements[dim], Replicate)
    return value.device_mesh.get_group(dim) if same else None


def offsets_of_all(tensors: Iterable[torch.Tensor]) -> list[tuple[int, ...]]:
    """Return where this rank's part of each tensor begins in the whole, per dimension.

    Computed once for all that are sharded alike: see `finding_once`.
    """
    find = functools.cache(shard_offsets)
    return [
        find(t.shape, t.device_mesh, t.placements) if isinstance(t, DTensor) else (0,) * t.ndim
        for t in tensors
    ]


@contextmanager
def finding_once() -> Iterator[None]:
    """Let torch.distributed.checkpoint cache shard places by shape, mesh and placements.

    If tensor and data parallelism shard the same dimension, PyTorch computes the shards of all
    ranks of the mesh to find one: 17 ms per tensor with 1,024 x 8 ranks. A model has thousands of
    tensors, but only a few shapes.
    """
    with patch(
        "torch.distributed.checkpoint.planner_helpers.compute_local_shape_and_global_offset",
        functools.cache(compute_local_shape_and_global_offset),
    ):
        yield


def shard_offsets(
    shape: torch.Size, mesh: DeviceMesh, placements: tuple[Placement, ...]
) -> tuple[int, ...]:
    """Return the same of a tensor of this shape, sharded like this."""
    _, offsets = compute_local_shape_and_global_offset(shape, mesh, placements)
    return tuple(offsets)
