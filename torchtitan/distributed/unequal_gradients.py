"""Gradients of what several ranks hold whole, which must be the same on each of them."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from torchtitan.distributed.names import canonical_name
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.utils import local_tensor
from torchtitan.tools.text import few

logger = logging.getLogger("torchtitan")

_DIMS = {
    "tp": "tensor parallelism",
    "cp": "context parallelism",
    "dp_shard": "data parallelism",
    "dp_replicate": "data parallelism",
}
"""Dimensions of the mesh whose ranks may hold the same parameter, and their names."""
_WITHIN = {
    "dp": ("dp_replicate", "dp_shard"),
    "dp_shard_cp": ("dp_shard", "cp"),
    "dp_cp": ("dp_replicate", "dp_shard", "cp"),
    **dict.fromkeys(("expert_dp", "ep", "etp"), ("dp_shard", "cp", "tp")),
}
"""Other names of dimensions, and what they are of."""
_ROUNDING = 0.05
"""Share of a gradient's norm by which copies may differ: sums of other tokens differ by far more,
rounding to bfloat16 by less."""


@torch.no_grad()
def warn_of_unequal_gradients(model_parts: list[nn.Module], parallel_dims: ParallelDims) -> None:
    """Warn of parameters that each rank would train on its own tokens alone.

    That is so where ranks have different tokens, and nothing adds up the gradients of a parameter
    that each of them holds as a plain tensor: their weights drift apart, and the loss falls all the
    same. All ranks call this after the backward pass, once, as gradients are sent whole.
    """
    world_mesh = parallel_dims.world_mesh
    params = [(n, p) for part in model_parts for n, p in part.named_parameters() if p.requires_grad]
    for dim in (dim for dim in _DIMS if dim in (world_mesh.mesh_dim_names or ())):
        mesh = world_mesh[dim]
        copies = [(name, param) for name, param in params if dim not in _dims_of(param)]
        if mesh.size() == 1 or not copies:
            continue
        differences = torch.stack([_difference(param, mesh) for _, param in copies])
        dist.all_reduce(differences, dist.ReduceOp.MAX, mesh.get_group())
        unequal = [
            f"{canonical_name(name)} (by {difference:.2g} of their norm)"
            for (name, _), difference in zip(copies, differences.tolist(), strict=True)
            if difference > _ROUNDING
        ]
        if unequal and mesh.get_local_rank() == 0:
            logger.warning(
                "the ranks of %s have different gradients of %s. Each rank then trains its own "
                "weights, and a checkpoint keeps only one of them: the model's parallelize_fn "
                "must make these parameters sharded or replicated DTensors, as SequenceParallel() "
                "does in a tensor-parallel plan and apply_fsdp for data and context parallelism. "
                "`torchtitan verify` compares layouts with one process",
                *(_DIMS[dim], few(unequal, 5)),
            )


def _dims_of(param: nn.Parameter) -> set[str]:
    """Dimensions of the world's mesh over which PyTorch knows how the parameter is placed."""
    names = param.device_mesh.mesh_dim_names or () if isinstance(param, DTensor) else ()
    return {dim for name in names for dim in _WITHIN.get(name, (name,))}


def _difference(param: nn.Parameter, mesh: DeviceMesh) -> torch.Tensor:
    """Of this rank's gradient from the mean of the ranks of `mesh`, over the norm of that."""
    grad = torch.zeros_like(param) if param.grad is None else param.grad
    own = local_tensor(grad).to(mesh.device_type, torch.float32)
    mean = own / mesh.size()
    dist.all_reduce(mean, group=mesh.get_group())
    return (own - mean).norm() / mean.norm().clamp(min=torch.finfo(torch.float32).tiny)
