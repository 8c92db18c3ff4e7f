"""Find state that a checkpoint would not hold, after the first step."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from torchtitan.components.checkpoint.model_tensors import saved_buffers
from torchtitan.components.replay import checksum
from torchtitan.distributed.names import canonical_name
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.errors import ConfigError
from torchtitan.runtime.host_sum import sum_over_ranks
from torchtitan.tools.logging import logger
from torchtitan.tools.text import few


@torch.no_grad()
def check_optimizer_state(
    optimizers: Iterable[torch.optim.Optimizer], model_parts: list[nn.Module]
) -> None:
    """Refuse state that checkpoints cannot hold, and warn of state that each rank has for itself.

    All ranks call this after an optimizer step.

    Raises:
        ConfigError: a state belongs to no parameter, or is neither a tensor nor a number.
    """
    names: dict[Any, str] = {
        param: canonical_name(name)
        for part in model_parts
        for name, param in part.named_parameters()
    }
    of_mesh: dict[DeviceMesh, list[tuple[str, torch.Tensor]]] = defaultdict(list)
    for optimizer in optimizers:
        _refuse_unsavable(optimizer, names)
        for param in (param for group in optimizer.param_groups for param in group["params"]):
            if isinstance(param, DTensor):  # also without state, as the ranks must agree on these
                digest = _digest(optimizer.state.get(param, {}), param.to_local().device)
                of_mesh[param.device_mesh].append((names[param], digest))
    unequal = [name for mesh, found in of_mesh.items() for name in _unequal(mesh, found)]
    if unequal:
        logger.warning(
            "the optimizer's state of %s differs between ranks that share the parameter. A "
            "checkpoint keeps that of one rank, so a resumed run would go on with wrong numbers. "
            "Derive the state from the parameter or its gradient, as torch.zeros_like(param) does, "
            "not from their to_local(): it is then a DTensor, and saved whole",
            few(unequal, 5),
        )


@torch.no_grad()
def warn_of_unequal_buffers(model_parts: list[nn.Module], parallel_dims: ParallelDims) -> None:
    """Warn about buffers that each rank has changed by its own tokens. All ranks call this."""
    mesh = parallel_dims.world_mesh
    mesh = mesh[tuple(dim for dim in mesh.mesh_dim_names or () if dim != "pp")]
    buffers = saved_buffers(model_parts).items()
    found = [(n, checksum(b)) for n, b in buffers if not isinstance(b, DTensor)]
    if found and (unequal := _unequal(mesh, found)):
        logger.warning(
            "the buffers %s differ between ranks after the first step. Each rank then computes "
            "with its own, and a checkpoint keeps only those of one: let forward only add to a "
            "buffer with persistent=False, and change the others by its sum over all ranks, once "
            "a step (docs/own_modules.md, State that is not trained)",
            few(unequal, 5),
        )


def _refuse_unsavable(optimizer: torch.optim.Optimizer, names: dict[Any, str]) -> None:
    cls = type(optimizer).__name__
    for param, state in optimizer.state.items():
        if param not in names:
            raise ConfigError(
                f"{cls} keeps state[{param!r}], which is of no parameter, and checkpoints would "
                "lack. Keep it in state[param] of each parameter, or in param_groups"
            )
        for name, value in _leaves(state):
            if not isinstance(value, torch.Tensor | int | float):
                raise ConfigError(
                    f"{cls} keeps {name!r} of {names[param]} as {type(value).__name__}, but "
                    "checkpoints hold tensors, numbers, and dicts of them with strings as keys"
                )


def _leaves(state: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in state.items():
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _digest(state: dict[str, Any], device: torch.device) -> torch.Tensor:
    """Return a checksum of the values that are no DTensors, an int64 scalar on `device`."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    for name, value in _leaves(state):
        if not isinstance(value, DTensor):
            tensor = torch.as_tensor(value, dtype=None if torch.is_tensor(value) else torch.float64)
            total += zlib.crc32(name.encode()) * checksum(tensor).to(device)
    return total


def _unequal(mesh: DeviceMesh, found: list[tuple[str, torch.Tensor]]) -> list[str]:
    """Return, on the first rank, names whose digests differ. All ranks of `mesh` call this."""
    # On the host: on GPUs, groups that are used here only would take memory for the whole run.
    own = torch.stack([digest for _, digest in found]).cpu()
    largest = torch.stack([own, ~own])
    for dim in range(mesh.ndim):
        sum_over_ranks(largest, dist.ReduceOp.MAX, mesh.get_group(dim))
    if any(mesh.get_coordinate() or ()):
        return []
    equal = (largest[0] == ~largest[1]).tolist()
    return [name for (name, _), same in zip(found, equal, strict=True) if not same]
