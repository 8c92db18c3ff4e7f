"""Spread gpt-oss over devices: a plan, and six calls in order."""

from __future__ import annotations

import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import SequenceParallel

from torchtitan.config import JobConfig
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.distributed.compile import apply_compile
from torchtitan.distributed.context_parallel import apply_cp
from torchtitan.distributed.expert_parallel import apply_expert_parallel, moe_plan
from torchtitan.distributed.fsdp import apply_fsdp
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.parallel_styles import HeadwiseParallel
from torchtitan.distributed.tensor_parallel import Plan, apply_tensor_parallel, attention_plan

from ..model.model import TransformerBlock


def parallelize_gpt_oss(
    model: nn.Module,
    world_mesh: DeviceMesh,
    parallel_dims: ParallelDims,
    job_config: JobConfig,
) -> nn.Module:
    """Apply tensor, context, expert and data parallelism, checkpointing and compilation."""
    if parallel_dims.tp_enabled:
        apply_tp(model, world_mesh["tp"], job_config)
    if parallel_dims.cp_enabled:
        apply_cp(model, world_mesh["cp"], job_config)
    expert_meshes = apply_expert_parallel(model, parallel_dims)
    apply_ac(model, job_config)
    model = apply_compile(model, job_config)
    if parallel_dims.dp_enabled or expert_meshes:
        apply_fsdp(model, world_mesh["dp"], job_config, expert_meshes)
    return model


def apply_tp(model: nn.Module, tp_mesh: DeviceMesh, job_config: JobConfig) -> None:
    """Split heads; between attention and experts, shard the sequence."""
    apply_tensor_parallel(model, tp_mesh, job_config, _plan_of_block)


def _plan_of_block(block: TransformerBlock) -> Plan:
    return {
        "attention_norm": SequenceParallel(),
        **attention_plan(),
        "attention.sinks": HeadwiseParallel(),
        "ffn_norm": SequenceParallel(),
        **moe_plan(block.moe),
    }
