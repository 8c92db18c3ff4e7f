"""Spread DeepSeek-V3 over devices: a plan, and six calls in order."""

from __future__ import annotations

import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

from torchtitan.config import JobConfig
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.distributed.compile import apply_compile
from torchtitan.distributed.context_parallel import apply_cp
from torchtitan.distributed.expert_parallel import apply_expert_parallel, moe_plan
from torchtitan.distributed.fsdp import apply_fsdp
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.parallel_styles import (
    EmbeddingParallel,
    SequenceParallelLinear,
    SharedInput,
)
from torchtitan.distributed.tensor_parallel import Plan, apply_tensor_parallel, feed_forward_plan

from ..model.model import MTPBlock, TransformerBlock


def parallelize_deepseek_v3(
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
    """Split heads and feed-forward features; between them, shard the sequence."""
    plan: Plan = {"mtp_embeddings": EmbeddingParallel(output_layouts=Shard(1))}
    if model.tok_embeddings is not None:  # the same module
        plan = {}
    apply_tensor_parallel(model, tp_mesh, job_config, _plan_of_block, plan)


def _plan_of_block(block: TransformerBlock) -> Plan:
    """Return the plan of a block, with or without experts.

    Each rank computes the latents of its part of the sequence. These are gathered rather than the
    hidden states, which are several times as large.
    """
    plan: Plan = {
        "attention_norm": SequenceParallel(),
        "attention.wkv_a": SequenceParallelLinear(),
        "attention.kv_norm": SequenceParallel(),
        "attention.wkv_b": ColwiseParallel(input_layouts=Shard(1)),
        "attention.rotary_key": SharedInput(),
        "attention.wo": RowwiseParallel(output_layouts=Shard(1)),
        "ffn_norm": SequenceParallel(),
    }
    if block.attention.wq is not None:
        plan |= {"attention.wq": ColwiseParallel(input_layouts=Shard(1))}
    else:
        plan |= {
            "attention.wq_a": SequenceParallelLinear(),
            "attention.q_norm": SequenceParallel(),
            "attention.wq_b": ColwiseParallel(input_layouts=Shard(1)),
        }
    if isinstance(block, MTPBlock):
        plan |= {
            "embedding_norm": SequenceParallel(),
            "hidden_norm": SequenceParallel(),
            "projection": SequenceParallelLinear(use_local_output=True),
            "norm": SequenceParallel(),
        }
    return plan | (feed_forward_plan() if block.moe is None else moe_plan(block.moe))
