"""Warn about options that functions of a model's `TrainSpec` ignore."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from torchtitan.config import JobConfig
from torchtitan.config.load import origin
from torchtitan.distributed.activation_checkpoint import is_checkpointed
from torchtitan.distributed.context_parallel import require_applied_cp
from torchtitan.tools.logging import rank0


def check_applied(model_parts: list[nn.Module], job_config: JobConfig) -> None:
    """Warn on rank 0 about options that `parallelize_fn` left without effect.

    Raises:
        ConfigError: it is context parallelism, without which the numbers would be wrong.
    """
    if job_config.parallelism.context_parallel_degree > 1:
        require_applied_cp(model_parts, job_config)
    modules = [module for part in model_parts for module in part.modules()]
    # A pipeline stage may have none.
    has_layers = any(len(getattr(part, "layers", ())) for part in model_parts)
    for key, function in _unapplied(modules, has_layers, job_config):
        rank0.warning(
            "%s: has no effect, because the parallelize_fn of %s does not call "
            "torchtitan.distributed.%s here",
            *(origin(job_config, key), job_config.model.name, function),
        )


@contextmanager
def warn_of_unread(section: str, builder: str, job_config: JobConfig) -> Iterator[None]:
    """Warn on rank 0 about keys of a section that are set, but not read within the context.

    Args:
        section: `loss`, for example.
        builder: the function that runs in the context, `build_loss_fn` for example.
    """
    config, read = getattr(job_config, section), set()
    kind = type(config)

    def record(recorded: Any, name: str) -> Any:
        read.add(name)
        return object.__getattribute__(recorded, name)

    recorded = type(kind.__name__, (kind,), {"__getattribute__": record})(**vars(config))
    setattr(job_config, section, recorded)
    try:
        yield
    finally:
        setattr(job_config, section, config)
    default = kind()
    for name in (field.name for field in fields(kind) if field.name not in read):
        if getattr(config, name) != getattr(default, name):
            rank0.warning(
                "%s: may have no effect, because the %s of %s does not read it",
                *(origin(job_config, f"{section}.{name}"), builder, job_config.model.name),
            )


def _unapplied(
    modules: list[nn.Module], has_layers: bool, job_config: JobConfig
) -> Iterator[tuple[str, str]]:
    """Yield keys of options, and the call in `torchtitan.distributed` that applies them."""
    parallelism = job_config.parallelism
    params = [param for module in modules for param in module.parameters(recurse=False)]
    meshes = [param.device_mesh for param in params if isinstance(param, DTensor)]
    dims = {name for mesh in meshes for name in mesh.mesh_dim_names or ()}
    if parallelism.tensor_parallel_degree > 1 and has_layers and "tp" not in dims:
        call = "tensor_parallel.apply_tensor_parallel(model, tp_mesh, job_config, block_plan)"
        yield "parallelism.tensor_parallel_degree", call
    whole = parallelism.pipeline_parallel_degree == 1  # some stages may have no experts
    if parallelism.expert_parallel_degree > 1 and whole and "ep" not in dims:
        call = "expert_parallel.apply_expert_parallel(model, parallel_dims) with an MoE of ours"
        yield "parallelism.expert_parallel_degree", call
    yield from _other_dtypes(modules, job_config)
    config = job_config.activation_checkpoint
    if config.mode == "memory_budget":
        applied = torch._functorch.config.activation_memory_budget == config.memory_budget
    else:
        applied = config.mode == "none" or not has_layers or any(map(_recomputes, modules))
    if not applied:
        yield "activation_checkpoint.mode", "activation_checkpoint.apply_ac(model, job_config)"
    wanted = job_config.compile.compiles("model")
    if wanted and has_layers and not any(map(_is_compiled, modules)) and _compiler_is_on():
        yield "compile.enable", "compile.apply_compile(model, job_config)"


def _other_dtypes(modules: list[nn.Module], job_config: JobConfig) -> Iterator[tuple[str, str]]:
    """Yield the keys of dtypes that the model's own calls of `fully_shard` do not use."""
    sharded: list[Any] = [module for module in modules if isinstance(module, FSDPModule)]
    policies = [module._get_fsdp_state()._mp_policy for module in sharded]
    found = {
        "param": {policy.param_dtype or torch.float32 for policy in policies},
        "reduce": {p.reduce_dtype or p.param_dtype or torch.float32 for p in policies},
    }
    for kind, dtypes in found.items():
        key = f"mixed_precision_{kind}"
        if dtypes and getattr(torch, getattr(job_config.training, key)) not in dtypes:
            yield f"training.{key}", "fsdp.apply_fsdp(model, dp_mesh, job_config)"


def _recomputes(module: nn.Module) -> bool:
    """Return whether `apply_ac` or torch's own wrapper checkpoints the module."""
    return is_checkpointed(module) or isinstance(module, CheckpointWrapper)


def _is_compiled(module: nn.Module) -> bool:
    """Return whether the module or its forward was compiled, or `module.compile()` was called."""
    forward: Any = module.forward
    forwards = forward, getattr(forward, "checkpoint_of", None)
    return module._compiled_call_impl is not None or any(map(_is_marked, forwards))


def _is_marked(function: Any) -> bool:
    """Return whether the compiler has marked the function as compiled, not as disabled."""
    compiled = hasattr(function, "_torchdynamo_orig_callable")
    return compiled and not hasattr(function, "_torchdynamo_disable")


def _compiler_is_on() -> bool:
    """Return False under TORCHDYNAMO_DISABLE, where `torch.compile` returns its argument."""
    return _is_marked(torch.compile(_compiler_is_on))
