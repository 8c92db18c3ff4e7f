"""Runs one training step of one rank without memory, network or devices, and records what it costs.

The model, its `parallelize_fn`, the loss and the optimizer are the real ones; tensors are fake
(`FakeTensorMode`) and so is the process group, so one process stands for any rank of any world.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from torchtitan.config.validate import validate
from torchtitan.distributed.fsdp import sum_gradients
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.pipeline_parallel import FIRST_MODULES, LAST_MODULES
from torchtitan.distributed.pipeline_split import split_model, stages_of_rank
from torchtitan.planning.collectives import Collective, CollectiveRecorder
from torchtitan.planning.memory import PeakMemory
from torchtitan.planning.operations import Operation, OperationRecorder
from torchtitan.protocols.train_spec import get_train_spec

if TYPE_CHECKING:
    from torchtitan.components.loss import Loss
    from torchtitan.config import JobConfig


@dataclass
class PassTrace:
    """What a forward or backward pass of one stage, or the optimizer step, does."""

    operations: Counter[Operation] = field(default_factory=Counter)
    collectives: list[Collective] = field(default_factory=list)


@dataclass
class StageTrace:
    """One stage of this rank, on one micro-batch. Bytes of this rank."""

    parameters: int = 0
    buffers: int = 0
    gradients: int = 0
    optimizer_state: int = 0
    activations: int = 0
    """What the forward pass keeps for the backward pass, its output included."""
    output: int = 0
    """What goes to the next stage."""
    temporary: int = 0
    """At the peak of a forward and backward pass, above all the others."""
    forward: PassTrace = field(default_factory=PassTrace)
    backward: PassTrace = field(default_factory=PassTrace)


@dataclass
class StepTrace:
    """What one rank does for one micro-batch and the optimizer step after it, in a steady state."""

    parameters: int
    """Elements of all stages of this rank that this rank holds."""
    collectives: list[Collective] = field(default_factory=list)
    """Of the forward and backward pass and the optimizer step, in order."""
    peak_memory: int = 0
    """Bytes of all tensors at the peak: parameters, gradients, optimizer state, activations."""
    stages: list[StageTrace] = field(default_factory=list)
    optimizer: PassTrace = field(default_factory=PassTrace)


@contextmanager
def fake_world(world_size: int, rank: int) -> Iterator[None]:
    """This process is rank `rank` of `world_size`, whose collectives do nothing.

    Raises:
        RuntimeError: a process group exists already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    environment = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0"}
    with patch.dict(os.environ, environment):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            yield
        finally:
            dist.destroy_process_group()
            _clear_sharding_prop_cache()  # it holds meshes, whose groups are gone


def trace_step(job_config: JobConfig) -> StepTrace:
    """Trace a step within a `fake_world`, on the CPU's code paths.

    Of a pipeline, the rank's stages are run one after the other on one micro-batch.

    Raises:
        ConfigError: the job is not valid for the world.
    """
    spec = get_train_spec(job_config.model.name, job_config.model.flavor)
    world_size = dist.get_world_size()
    validate(job_config, world_size)
    model_args = spec.model_args.update_from_config(job_config)
    dims = ParallelDims.from_config(job_config.parallelism, world_size)
    layout = dims.world_mesh, dims, job_config
    groups = dims.groups()

    with torch.device("meta"):
        model = spec.model_cls(model_args)
    accepts_positions = "positions" in inspect.signature(model.forward).parameters
    parts, batch = [model], job_config.training.local_batch_size
    if dims.pp_enabled:
        stages = stages_of_rank(job_config, dims.world_mesh["pp"].get_local_rank())
        parts = split_model(model, job_config, stages, FIRST_MODULES, LAST_MODULES)
        batch = job_config.parallelism.pipeline_parallel_microbatch_size
    parts = [spec.parallelize_fn(part, *layout) for part in parts]
    for part in parts:
        sum_gradients(part)

    memory, recorder = PeakMemory(), CollectiveRecorder(groups)
    # Each rank keeps only its part of a sequence.
    seq = job_config.training.seq_len // dims.cp
    stage_traces = []
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for part in parts:
            part.to_empty(device="cpu")
        loss_fn = spec.build_loss_fn(job_config)
        loss_fn.attach(parts)
        optimizers = spec.build_optimizer_fn(parts, job_config, dims)
        memory.add(*(tensor for part in parts for tensor in (*part.parameters(), *part.buffers())))
        held = memory.current
        with memory:  # the optimizer makes its state in its first step
            for part in parts:
                for param in part.parameters():
                    param.grad = torch.zeros_like(param)
            gradients = memory.current - held
            optimizers.step()
            state = memory.current - held - gradients
            optimizers.zero_grad()
        memory.reset_peak()
        tokens = torch.zeros(batch, seq, dtype=torch.int64)
        inputs = {"positions": tokens.clone()} if accepts_positions else {}
        numels = [sum(_local_numel(p) for p in part.parameters()) for part in parts]
        with memory, recorder:
            for part, numel in zip(parts, numels, strict=True):
                step = _Step(memory, recorder, dims, job_config)
                trace = step.forward_backward(part, tokens, inputs, loss_fn)
                share = numel / max(sum(numels), 1)
                trace.gradients, trace.optimizer_state = int(gradients * share), int(state * share)
                stage_traces.append(trace)
            first = len(recorder.collectives)
            with OperationRecorder() as operations:
                optimizers.step()
            optimizers.zero_grad()
    return StepTrace(
        parameters=sum(numels),
        collectives=recorder.collectives,
        peak_memory=memory.peak,
        stages=stage_traces,
        optimizer=PassTrace(operations.operations, recorder.collectives[first:]),
    )


class _Step:
    """Runs a whole model, or a stage of a pipeline with hidden states of the right shape."""

    def __init__(
        self,
        memory: PeakMemory,
        recorder: CollectiveRecorder,
        dims: ParallelDims,
        job_config: JobConfig,
    ) -> None:
        self._memory, self._recorder = memory, recorder
        self._dims, self._config = dims, job_config

    def forward_backward(
        self,
        part: nn.Module,
        tokens: torch.Tensor,
        inputs: dict[str, torch.Tensor],
        loss_fn: Loss,
    ) -> StageTrace:
        trace, memory = StageTrace(), self._memory
        trace.parameters = sum(_local_bytes(param) for param in part.parameters())
        trace.buffers = sum(_local_bytes(buffer) for buffer in part.buffers())
        entry = tokens if part.tok_embeddings is not None else self._hidden_states(part, tokens)
        before = memory.current
        outer_peak, memory.peak = memory.peak, before
        with self._recording(trace.forward):
            out = part(entry, **inputs)
            loss = None if part.output is None else loss_fn(out, tokens)
        trace.activations = memory.current - before
        trace.output = _local_bytes(out) if loss is None else 0
        with self._recording(trace.backward):
            if loss is None:
                out.backward(torch.zeros_like(out))
            else:
                del out  # as the trainer does
                loss.backward()
        trace.temporary = memory.peak - before
        memory.peak = max(memory.peak, outer_peak)
        return trace

    def _hidden_states(self, part: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        parallelism = self._config.parallelism
        sequence_parallel = self._dims.tp > 1 and not parallelism.disable_sequence_parallel
        seq = tokens.shape[1] // (self._dims.tp if sequence_parallel else 1)
        dtype = getattr(torch, self._config.training.mixed_precision_param)
        return torch.zeros(tokens.shape[0], seq, part.args.dim, dtype=dtype, requires_grad=True)

    @contextmanager
    def _recording(self, pass_trace: PassTrace) -> Iterator[None]:
        first = len(self._recorder.collectives)
        with OperationRecorder() as recorder:
            yield
        pass_trace.operations = recorder.operations
        pass_trace.collectives = self._recorder.collectives[first:]


def _local_bytes(tensor: torch.Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()


def _local_numel(param: nn.Parameter) -> int:
    return (param.to_local() if isinstance(param, DTensor) else param).numel()
