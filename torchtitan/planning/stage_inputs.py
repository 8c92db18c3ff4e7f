"""Builds the inputs of a forward pass: those of a batch, and those from the stage before."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn

from torchtitan.components.data_loader import Batch
from torchtitan.components.model_inputs import (
    in_precision,
    own_inputs,
    sequence_shape,
    sequences,
    usual_inputs,
)
from torchtitan.config import JobConfig
from torchtitan.distributed.dtensor import local_tensor
from torchtitan.distributed.fsdp import fsdp_modules, mixed_precision
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.protocols.train_spec import train_spec_of

from .inputs import Inputs


def micro_batch(job_config: JobConfig, dims: ParallelDims, inputs: Inputs) -> Batch:
    """Return zeros for one forward pass of a rank, which has a part of each sequence."""
    size = job_config.training.local_batch_size
    if dims.pp_enabled:
        size = job_config.parallelism.pipeline_parallel_microbatch_size
    batch = inputs.batch(size, job_config.training.seq_len)
    if dims.cp_enabled:
        spec = train_spec_of(job_config)
        shared = sequences(batch, spec.model_cls.sequence_inputs)
        batch |= {name: t.chunk(dims.cp, 1)[0].contiguous() for name, t in shared.items()}
    # Floating-point inputs in the dtype that the trainer gives to a model.
    dtype = getattr(torch, job_config.training.mixed_precision_param)
    return {
        name: tensor if name == "labels" else in_precision(tensor, dtype)
        for name, tensor in batch.items()
    }


def step_inputs(
    part: nn.Module, dims: ParallelDims, job_config: JobConfig, batch: Batch
) -> dict[str, torch.Tensor]:
    """Return the inputs of `forward` besides tokens."""
    names = usual_inputs(part, dims, job_config)
    if shape := sequence_shape(batch):  # the model's own loader may give some of another shape
        batch = dict.fromkeys(names, torch.zeros(shape, dtype=torch.int64)) | batch
    return {name: batch[name].clone() for name in names if name in batch} | own_inputs(batch)


def tensors_of(out: Any) -> tuple[torch.Tensor, ...]:
    """Return a tensor as a tuple, or the tensors of a tuple."""
    return tuple(out) if isinstance(out, tuple | list) else (out,)


def handed_on(
    first: nn.Module, job_config: JobConfig, dims: ParallelDims, inputs: Inputs
) -> tuple[torch.Tensor, ...]:
    """Return the output of the parallelised first stage. Call within a `FakeTensorMode`."""
    batch = micro_batch(job_config, dims, inputs)
    autocast = mixed_precision(bool(fsdp_modules(first)), job_config, torch.device("cpu"))
    with autocast:
        out = first(batch["tokens"], **step_inputs(first, dims, job_config, batch))
    return tuple(map(local_tensor, tensors_of(out)))
