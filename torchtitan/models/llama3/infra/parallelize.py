"""Spread Llama 3 over devices: a plan, and five calls in order."""

from __future__ import annotations

import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import SequenceParallel

from torchtitan.config import JobConfig
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.distributed.compile import apply_compile
from torchtitan.distributed.context_parallel import apply_cp
from torchtitan.distributed.fsdp import apply_fsdp
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.tensor_parallel import (
    apply_tensor_parallel,
    attention_plan,
    feed_forward_plan,
)


def parallelize_llama(
    model: nn.Module,
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
    model = apply_compile(model, job_config)
    if parallel_dims.dp_enabled:
        apply_fsdp(model, world_mesh["dp"], job_config)
    return model


def apply_tp(model: nn.Module, tp_mesh: DeviceMesh, job_config: JobConfig) -> None:
    """Split heads and feed-forward features; between them, shard the sequence."""
    block_plan = {
        "attention_norm": SequenceParallel(),
        **attention_plan(),
        "ffn_norm": SequenceParallel(),
        **feed_forward_plan(),
    }
    apply_tensor_parallel(model, tp_mesh, job_config, block_plan)
