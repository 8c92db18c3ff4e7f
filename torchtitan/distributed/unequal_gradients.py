"""Find parameters that parallelism left out, by their gradients in the first step."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from torchtitan.distributed.dtensor import local_tensor
from torchtitan.distributed.names import canonical_name
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.errors import ConfigError
from torchtitan.tools.logging import logger
from torchtitan.tools.text import few

_DIMS = {
    "tp": "tensor parallelism",
    "cp": "context parallelism",
    "dp_shard": "data parallelism",
    "dp_replicate": "data parallelism",
}
"""Mesh dimensions whose ranks may hold the same parameter -> their names in messages."""
_WITHIN = {
    "dp": ("dp_replicate", "dp_shard"),
    "dp_shard_cp": ("dp_shard", "cp"),
    "dp_cp": ("dp_replicate", "dp_shard", "cp"),
    **dict.fromkeys(("expert_dp", "ep", "etp"), ("dp_shard", "cp", "tp")),
}
"""Mesh dimension that is made of others -> those others."""
_ROUNDING = 0.05
"""Largest accepted difference, as a share of the gradient's norm. Rounding to bfloat16 stays below
it; gradients of different tokens are far above it."""


@torch.no_grad()
def warn_of_unequal_gradients(model_parts: list[nn.Module], parallel_dims: ParallelDims) -> None:
    """Warn about parameters that each rank would train on its own tokens only.

    This happens if ranks have different tokens, each holds the parameter as a plain tensor, and
    nothing sums its gradients. The copies then drift apart, although the loss still falls. All
    ranks call this after a backward pass, and the first of each pipeline stage warns. It sends
    whole gradients, so call it once.

    Raises:
        ConfigError: a plain tensor met a DTensor, which PyTorch permits for a single number.
    """
    world_mesh = parallel_dims.world_mesh
    params = [(n, p) for part in model_parts for n, p in part.named_parameters() if p.requires_grad]
    plain = ((name, param) for name, param in params if not isinstance(param, DTensor))
    refuse_mixed([name for name, param in plain if isinstance(param.grad, DTensor)])
    meshes = {dim: world_mesh[dim] for dim in _DIMS if dim in (world_mesh.mesh_dim_names or ())}
    for dim, mesh in meshes.items():
        copies = [(name, param) for name, param in params if dim not in _dims_of(param)]
        if mesh.size() == 1 or not copies:
            continue
        differences = torch.stack([_difference(param, mesh) for _, param in copies])
        for of_stage in meshes.values():  # some ranks may have no labels, and so no gradients
            dist.all_reduce(differences, dist.ReduceOp.MAX, of_stage.get_group())
        unequal = [
            f"{canonical_name(name)} (by {difference:.2g} of their norm)"
            for (name, _), difference in zip(copies, differences.tolist(), strict=True)
            if difference > _ROUNDING
        ]
        if unequal and parallel_dims.is_first_of_stage:
            logger.warning(
                "the ranks of %s have different gradients of %s. Each rank then trains its own "
                "weights, and a checkpoint keeps only one of them: the model's parallelize_fn "
                "must make these parameters sharded or replicated DTensors, as SequenceParallel() "
                "does in a tensor-parallel plan and apply_fsdp for data and context parallelism. "
                "`torchtitan verify` compares layouts with one process",
                *(_DIMS[dim], few(unequal, 5)),
            )


def refuse_mixed(names: list[str]) -> None:
    """Raise `ConfigError` if there are plain tensors that met a DTensor: their gradient is one."""
    if names:
        raise ConfigError(
            f"the model's parallelize_fn leaves out {few([canonical_name(n) for n in names])}, but "
            "uses it with DTensors, such as the output of a SequenceParallel() module. Put it in a "
            "module of its own, and give this SequenceParallel() in the tensor-parallel plan"
        )


def _dims_of(param: nn.Parameter) -> set[str]:
    """Return the dimensions of the world mesh over which the parameter has a DTensor placement."""
    names = param.device_mesh.mesh_dim_names or () if isinstance(param, DTensor) else ()
    return {dim for name in names for dim in _WITHIN.get(name, (name,))}


def _difference(param: nn.Parameter, mesh: DeviceMesh) -> torch.Tensor:
    """Return the norm of (own gradient - mean over `mesh`), divided by the norm of the mean."""
    grad = torch.zeros_like(param) if param.grad is None else param.grad
    own = local_tensor(grad).to(mesh.device_type, torch.float32)
    mean = own / mesh.size()
    dist.all_reduce(mean, group=mesh.get_group())
    return (own - mean).norm() / mean.norm().clamp(min=torch.finfo(torch.float32).tiny)
