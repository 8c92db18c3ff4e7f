"""Spread a model of transformers over devices: its own plan, and five calls in order."""

from __future__ import annotations

import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
)

from torchtitan.config import JobConfig, fail
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.distributed.compile import apply_compile
from torchtitan.distributed.context_parallel import apply_cp
from torchtitan.distributed.fsdp import apply_fsdp
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.tensor_parallel import Plan, apply_tensor_parallel

from ..model.model import TransformersModel

_OF_A_PART = "replicated_with_grad_allreduce"
"""transformers' style of modules that each rank applies to its heads or features."""


def parallelize_transformers(
    model: TransformersModel,
    world_mesh: DeviceMesh,
    parallel_dims: ParallelDims,
    job_config: JobConfig,
) -> nn.Module:
    """Apply tensor, context and data parallelism, activation checkpointing and compilation."""
    if parallel_dims.tp_enabled:
        apply_tp(model, world_mesh["tp"], job_config)
    if parallel_dims.cp_enabled:
        apply_cp(model, world_mesh["cp"], job_config)
    apply_ac(model, job_config)
    parallel: nn.Module = apply_compile(model, job_config)
    if parallel_dims.dp_enabled:
        apply_fsdp(parallel, world_mesh["dp"], job_config)
    return parallel


def apply_tp(model: TransformersModel, tp_mesh: DeviceMesh, job_config: JobConfig) -> None:
    """Split the matrices as the plan of transformers says; between them, shard the sequence."""
    styles = _styles()
    plan: Plan = {}
    for pattern, name in model.tp_plan.items():
        place = pattern.removeprefix("layers.*.")
        if place == pattern:
            continue  # beside the layers: the same for all models
        if name not in styles:
            fail(
                job_config,
                "parallelism.tensor_parallel_degree",
                f"transformers splits {pattern} in the way {name!r}, which is not supported. Set "
                "it to 1",
            )
        plan[place] = styles[name]
    if not plan:
        fail(
            job_config,
            "parallelism.tensor_parallel_degree",
            "transformers has no plan for this architecture. Set it to 1",
        )
    inner = {place.partition(".")[0] for place in plan}
    split = {place.partition(".")[0] for place, style in plan.items() if style is styles["colwise"]}
    names = {name for layer in model.layers.values() for name, _ in layer.named_parameters()}
    for place in sorted({name.rpartition(".")[0] for name in names} - plan.keys()):
        if place.endswith(".act_fn"):
            plan[place] = styles[_OF_A_PART]
        elif not place or place.partition(".")[0] in split:
            fail(
                job_config,
                "parallelism.tensor_parallel_degree",
                f"transformers' plan lacks {place or 'parameters of a layer'}. Set it to 1",
            )
    for name, keyword in model.calls.by_keyword.items():
        plan[name] = _whole_sequence(keyword) if name in inner else _own_part()
    apply_tensor_parallel(model, tp_mesh, job_config, plan)


def _styles() -> dict[str, ParallelStyle]:
    """Return transformers' names of styles with ours, for layers that get the whole sequence."""
    return {
        "colwise": ColwiseParallel(),
        "rowwise": RowwiseParallel(output_layouts=Shard(1)),
        "colwise_gather_output": ColwiseParallel(output_layouts=Replicate()),
        "rowwise_split_input": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        # Norms of heads, `[batch, seq, heads, head_dim]`.
        _OF_A_PART: SequenceParallel(sequence_dim=2, use_local_output=True),
    }


def _own_part() -> ParallelStyle:
    """Return the style of a norm, which each rank applies to its part of the sequence."""
    return SequenceParallel(use_local_output=True)


def _whole_sequence(keyword: str | None) -> ParallelStyle:
    """Return the style of a module whose matrices are split: it needs the whole sequence."""
    if keyword is None:
        return PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    return PrepareModuleInput(
        input_kwarg_layouts={keyword: Shard(1)}, desired_input_kwarg_layouts={keyword: Replicate()}
    )
