"""This rank's part of a DTensor."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a DTensor; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_offsets(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the index in the whole tensor at which this rank's part begins, per dimension."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim
    return shard_offsets(tensor.shape, tensor.device_mesh, tensor.placements)


def shard_offsets(
    shape: torch.Size, mesh: DeviceMesh, placements: tuple[Placement, ...]
) -> tuple[int, ...]:
    """Return `local_offsets` of tensors of this shape, sharded like this."""
    _, offsets = compute_local_shape_and_global_offset(shape, mesh, placements)
    return tuple(offsets)
