"""Data parallelism: FSDP2, HSDP and DDP, all through `fully_shard`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard

from torchtitan.config import JobConfig
from torchtitan.distributed.blocks import blocks_of
from torchtitan.distributed.names import canonical_name
from torchtitan.distributed.unequal_gradients import refuse_mixed
from torchtitan.errors import ConfigError


def apply_fsdp(
    model: nn.Module,
    dp_mesh: DeviceMesh,
    job_config: JobConfig,
    own_meshes: Mapping[nn.Module, DeviceMesh] | None = None,
) -> None:
    """Shard parameters, gradients and optimizer state over the data ranks, in place.

    `dp_mesh` is `world_mesh["dp"]`. Within it, `dp_shard` ranks shard and `dp_replicate` groups
    hold replicas: HSDP when both exceed one, DDP when only the latter does. Context ranks shard
    too, because they hold the same parameters for other tokens.

    Each block of the model (`blocks_of`) is gathered on its own; so is `tok_embeddings`. `norm` and
    `output` form one group that stays gathered, because the backward pass begins with it. A model
    may lack any of the three. Modules with other names and lists of modules are in the root's
    group. A module that several blocks share is a group of its own.

    Args:
        own_meshes: modules within blocks that are sharded over other meshes, each as its own group:
            experts, see `apply_expert_parallel`.

    Raises:
        ConfigError: a parameter has no dimension to shard along or no elements, parameters have
            different dtypes, or blocks share one, but not the module that holds it.
    """
    # torch.compile's wrapper delegates to the model.
    inner: Any = getattr(model, "_orig_mod", model)
    training = job_config.training
    data_mesh = _sharding_mesh(dp_mesh)
    options: dict[str, Any] = {
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=getattr(torch, training.mixed_precision_param),
            reduce_dtype=getattr(torch, training.mixed_precision_reduce),
        ),
    }
    if training.enable_cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())

    policy = job_config.parallelism.fsdp_reshard_after_forward
    if policy == "default" and job_config.parallelism.pipeline_parallel_degree > 1:
        policy = "never"

    def shard(
        modules: Any, mesh: DeviceMesh = data_mesh, reshard: bool = policy != "never"
    ) -> None:
        fully_shard(
            modules,
            mesh=mesh,
            # With one rank to shard over, freeing gathered parameters would save nothing.
            reshard_after_forward=reshard and mesh.size(-1) > 1,
            shard_placement_fn=_placement_over(mesh),
            **options,
        )

    _refuse_unshardable(inner)
    own_meshes = own_meshes or {}
    blocks = blocks_of(inner)
    shared = _modules_of_several_blocks(blocks)
    _refuse_parameters_of_several_blocks(blocks, shared)
    for module, own in own_meshes.items():
        shard(module, own)
    apart = [module for module in shared if module not in own_meshes]
    layers = list(dict.fromkeys(blocks.values()))
    for layer in dict.fromkeys([*apart, *layers]):
        shard(layer)
    embedding, norm, output = (
        _callable_part(inner, name) for name in ("tok_embeddings", "norm", "output")
    )
    head = [m for m in (norm, output) if m is not None]
    tied = bool(_parameters(embedding) & _parameters(output))
    if not tied:  # a tied weight must be in a single group, the root's
        if embedding is not None:
            is_table = type(embedding) is nn.Embedding  # its gradient needs only the tokens
            shard(embedding)
            # The backward pass ends here. By default, FSDP would prefetch the last group of the
            # previous micro-batch's forward pass.
            embedding.set_modules_to_backward_prefetch([embedding])
            embedding.set_unshard_in_backward(not is_table)
        if head:
            shard(head, reshard=policy == "always")
    fully_shard(inner, mesh=data_mesh, **options)
    if own_meshes:
        units = [[block, *(m for m in block.modules() if m in own_meshes)] for block in layers]
        _prefetch_whole_blocks([*units, head[:1]] if head and not tied else units)


def _refuse_unshardable(model: nn.Module) -> None:
    of_dtype: dict[torch.dtype, str] = {}
    for name, param in model.named_parameters():
        name = canonical_name(name)
        if param.ndim == 0:
            raise ConfigError(
                f"{name} has no dimensions, and data parallelism shards parameters "
                "along the first. Give it the shape [1]: nn.Parameter(torch.empty(1))"
            )
        if param.numel() == 0:
            raise ConfigError(f"{name} has no elements, which data parallelism cannot shard")
        for dim, ranks in _ranks_of_dims(param).items():
            length = param.size(dim)
            if (ranks - 1) * -(-length // ranks) >= length:  # they divide it as `torch.chunk` does
                raise ConfigError(
                    f"{name} {list(param.shape)}: tensor parallelism divides dimension {dim} over "
                    f"{ranks} ranks, and the last gets nothing of it, which data parallelism "
                    "cannot shard. Make it larger, or give it another style in the model's plan"
                )
        if param.requires_grad:
            of_dtype.setdefault(param.dtype, name)
    if len(of_dtype) > 1:
        found = ", ".join(f"{name} is {dtype}" for dtype, name in of_dtype.items())
        raise ConfigError(
            f"{found.replace('torch.', '')}, but data parallelism gathers parameters of one dtype. "
            "Make all float32: training.mixed_precision_param is the dtype of the computation"
        )


def _prefetch_whole_blocks(units: list[list[Any]]) -> None:
    """Gather a block and its experts while the block before it computes, in both directions.

    By default, a group is gathered when the host comes to it, ahead of the device. But in a block
    with experts the host waits to learn how many rows travel. And in the backward pass, experts
    would be gathered only when their block begins, although it uses them first.

    Args:
        units: in the order of the forward pass, each block with its experts, the block first.
    """
    for unit, following in pairwise(units):
        unit[0].set_modules_to_forward_prefetch(following)
        following[0].set_modules_to_backward_prefetch(unit)


def _callable_part(model: nn.Module, name: str) -> Any:
    """Return a module that FSDP can gather when it is called; None for a list, as it never is."""
    part = getattr(model, name, None)
    if not isinstance(part, nn.Module) or isinstance(part, nn.ModuleList | nn.ModuleDict):
        return None
    return part


def _parameters(module: nn.Module | None) -> set[nn.Parameter]:
    return set(module.parameters()) if module is not None else set()


def _modules_of_several_blocks(blocks: dict[str, nn.Module]) -> list[nn.Module]:
    """Return the outermost modules with parameters that belong to more than one block."""
    counts = Counter(module for block in blocks.values() for module in block.modules())
    found = [m for m, count in counts.items() if count > 1 and any(True for _ in m.parameters())]
    inside = {part for module in found for part in module.modules() if part is not module}
    return [module for module in found if module not in inside]


def _refuse_parameters_of_several_blocks(
    blocks: dict[str, nn.Module], shared: list[nn.Module]
) -> None:
    seen = {id(param): "" for module in shared for param in module.parameters()}
    for block_name, block in blocks.items():
        for name, param in block.named_parameters():
            own = f"{block_name}.{name}"
            other = seen.setdefault(id(param), own)
            if other and other != own:
                raise ConfigError(
                    f"{canonical_name(other)} and {canonical_name(own)} are one parameter, which "
                    "data parallelism cannot shard with both layers. Share the module that has "
                    "it, or keep it outside `layers` and pass it to them"
                )


def _placement_over(mesh: DeviceMesh) -> Callable[[nn.Parameter], Shard | None]:
    """Return how to cut a block's parameters: along rows (None), but experts as evenly as possible.

    With more ranks than experts, cutting between experts would leave ranks without any.
    """
    ranks = mesh.size(-1)

    def placement(param: nn.Parameter) -> Shard | None:
        if param.ndim < 3:
            return None
        taken = _ranks_of_dims(param)
        # FSDP cuts dimensions other than the first only evenly, and here none that is already cut.
        free = [dim for dim in (1, 2) if dim not in taken and param.size(dim) % ranks == 0]
        if param.size(0) // taken.get(0, 1) % ranks == 0 or not free:
            return None
        return Shard(free[0])

    return placement


def _ranks_of_dims(param: torch.Tensor) -> dict[int, int]:
    """Return dimension -> ranks that share it already, by tensor or expert parallelism."""
    taken: dict[int, int] = {}
    if isinstance(param, DTensor):
        for size, place in zip(param.device_mesh.shape, param.placements, strict=True):
            if not place.is_replicate():  # also a strided shard, which is no `Shard`
                dim = cast(Shard, place).dim
                taken[dim] = taken.get(dim, 1) * size
    return taken


def _sharding_mesh(dp_mesh: DeviceMesh) -> DeviceMesh:
    """Return the `dp_shard_cp` mesh, or the two-dimensional one when there are replicas."""
    world_mesh = dp_mesh._get_root_mesh()
    if "dp_replicate" in (world_mesh.mesh_dim_names or ()):
        return world_mesh["dp_replicate", "dp_shard_cp"]
    return world_mesh["dp_shard_cp"]


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def parameter_groups(model: nn.Module) -> list[Any]:
    """Return FSDP's groups of parameters, each an `FSDPParamGroup`, maybe of several modules."""
    groups = dict.fromkeys(map(_group_of, fsdp_modules(model)))
    return [group for group in groups if group is not None]


def _group_of(module: FSDPModule) -> Any:
    """Return the group that FSDP gathers for a module; None if others gather all its parameters."""
    return module._get_fsdp_state()._fsdp_param_group


def use_summed_gradients(model: nn.Module) -> None:
    """Make data ranks sum their gradients rather than average them.

    The trainer divides the loss by the number of tokens of all ranks, so the sum is the gradient of
    the mean over tokens, even when ranks hold different numbers of tokens.
    """
    for group in parameter_groups(model):
        _refuse_mixed_gradients(group)
    with_zeros: dict[Any, _WithZeros] = {}
    for module in fsdp_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        # If a rank's tokens do not use a parameter, its zeros are needed: gradients are packed, and
        # another parameter's would be added in their place.
        if hasattr(module, "set_reduce_scatter_unused_params"):  # since PyTorch 2.13
            module.set_reduce_scatter_unused_params(True, recurse=False)
        elif (group := _group_of(module)) is not None:
            if group not in with_zeros:
                group.post_backward = with_zeros[group] = _WithZeros(group)
            begin = torch.compiler.disable(with_zeros[group].begin)
            cast(nn.Module, module).register_forward_pre_hook(begin)


def _refuse_mixed_gradients(group: Any) -> None:
    """Let a group refuse plain tensors whose gradients are DTensors, which it cannot reduce.

    PyTorch permits both in one operation only for parameters of a single number.
    """
    plain = [own for own in group.fsdp_params if not own.is_dtensor]
    numbers = [own for own in plain if own.sharded_param.numel() == 1]
    post_backward = group.post_backward

    def checked(*args: Any) -> None:
        gathered = (own for own in numbers if hasattr(own, "_unsharded_param"))
        mixed = (own for own in gathered if isinstance(own.unsharded_param.grad, DTensor))
        refuse_mixed([own._param_fqn for own in mixed])
        post_backward(*args)

    if numbers:
        group.post_backward = checked


class _WithZeros:
    """The `post_backward` of a group of parameters, with zeros for gradients that are missing.

    After the backward pass, PyTorch calls it again for a group of several modules. Then there must
    be nothing to reduce.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self._post_backward: Callable[..., None] = group.post_backward
        self._has_reduced = False

    def begin(self, module: nn.Module, args: Any) -> None:
        self._has_reduced = False

    def __call__(self, *args: Any) -> None:
        again = self._has_reduced and self._group._training_state.name != "PRE_BACKWARD"
        reduces = self._group.reduce_grads and not again
        for own in self._group.fsdp_params if reduces else ():
            param = getattr(own, "_unsharded_param", None)  # None: not gathered yet
            if param is not None and param.requires_grad and own.unsharded_accumulated_grad is None:
                param.grad = torch.zeros_like(param) if param.grad is None else param.grad
        self._post_backward(*args)
        self._has_reduced |= reduces


def set_last_micro_batch(modules: list[FSDPModule], last: bool) -> None:
    """Postpone the all-reduce among replicas to the last micro-batch of a step."""
    for module in modules:
        module.set_requires_all_reduce(last, recurse=False)
        module.set_is_last_backward(last)


def shared_casts(
    passes: int, job_config: JobConfig, device: torch.device
) -> AbstractContextManager[Any]:
    """Return a context in which the passes of a step share the casts of weights by autocast.

    Autocast drops them when the outermost context ends. Under checkpointing, it would keep casts
    that are otherwise freed.
    """
    if passes == 1 or job_config.activation_checkpoint.mode != "none":
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def mixed_precision(
    fsdp: bool, job_config: JobConfig, device: torch.device
) -> AbstractContextManager[Any]:
    """Return a context for mixed precision where FSDP does not provide it.

    Args:
        fsdp: whether it is applied to all of this rank's parts of the model.
    """
    dtype = getattr(torch, job_config.training.mixed_precision_param)
    if fsdp or dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)
