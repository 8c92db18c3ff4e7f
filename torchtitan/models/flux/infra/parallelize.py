"""Spread FLUX.1 over devices: a plan, and five calls in order."""

from __future__ import annotations

from typing import cast

import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from torchtitan.config import JobConfig
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.distributed.compile import apply_compile
from torchtitan.distributed.context_parallel import apply_cp
from torchtitan.distributed.fsdp import apply_fsdp
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.tensor_parallel import Plan
from torchtitan.protocols.model import layers_of

from ..model.model import DoubleBlock, FluxModel


def parallelize_flux(
    model: nn.Module,
    world_mesh: DeviceMesh,
    parallel_dims: ParallelDims,
    job_config: JobConfig,
) -> nn.Module:
    """Apply tensor, context and data parallelism, activation checkpointing and compilation."""
    if parallel_dims.tp_enabled:
        apply_tp(model, world_mesh["tp"])
    if parallel_dims.cp_enabled:
        # A rank has a part of the text and of the patches. As all see each other, order is nothing.
        attended = cast(FluxModel, model).args.text_len + job_config.training.seq_len
        apply_cp(model, world_mesh["cp"], job_config, [attended])
    apply_ac(model, job_config)
    model = apply_compile(model, job_config)
    if parallel_dims.dp_enabled:
        apply_fsdp(model, world_mesh["dp"], job_config)
    return model


def apply_tp(model: nn.Module, tp_mesh: DeviceMesh) -> None:
    """Split heads and feed-forward features; between them, each rank has all tokens.

    They are not sharded over the sequence, since a shard could have both text and patches.
    """
    for block in layers_of(model).values():
        parts = ("text.", "image.") if isinstance(block, DoubleBlock) else ("",)
        parallelize_module(block, tp_mesh, {k: v for part in parts for k, v in plan(part).items()})
    if model.output is not None:  # else a later stage has it
        parallelize_module(model, tp_mesh, {"output.modulation": _gathered()})


def plan(prefix: str) -> Plan:
    """Return the plan of a stream, or of a single block."""
    styles: Plan = {
        "modulation": _gathered(),
        "heads": PrepareModuleInput(
            input_layouts=(Replicate(),), desired_input_layouts=(Replicate(),)
        ),
        "heads.wq": ColwiseParallel(),
        "heads.wk": ColwiseParallel(),
        "heads.wv": ColwiseParallel(),
        "heads.q_norm": SequenceParallel(sequence_dim=2, use_local_output=True),
        "heads.k_norm": SequenceParallel(sequence_dim=2, use_local_output=True),
        "wo": RowwiseParallel(),
        "w1": ColwiseParallel(),
        "w2": RowwiseParallel(),
    }
    return {prefix + name: style for name, style in styles.items()}


def _gathered() -> ColwiseParallel:
    """Return the style of a matrix that is split, but whose output each rank needs whole."""
    return ColwiseParallel(output_layouts=Replicate())
