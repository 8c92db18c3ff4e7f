"""Runs one training step of one rank without memory, network or devices, and records its costs.

The model, its `parallelize_fn`, the loss and the optimizer are the real ones; tensors are fake
(`FakeTensorMode`), as is the process group, so one process can stand for any rank of any world.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)

import torchtitan.models  # noqa: F401  (fills the registry)
from torchtitan.components.loss import attach_loss
from torchtitan.components.model_inputs import ModelInputs
from torchtitan.components.optimizer import check_rules, container_of, freeze
from torchtitan.components.quantization.float8_gather import use_float8_gathers
from torchtitan.config import JobConfig, fail, origin
from torchtitan.distributed.context_parallel import require_applied_cp
from torchtitan.distributed.expert_parallel import moe_layers
from torchtitan.distributed.fsdp import use_summed_gradients
from torchtitan.distributed.grad_norm import clip_grad_norm
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.pipeline_parallel import modules_around_layers
from torchtitan.distributed.pipeline_split import split_model, splits_backward, stages_of_rank
from torchtitan.distributed.pipeline_stage import differentiable_outputs
from torchtitan.distributed.tying import allocate
from torchtitan.errors import ConfigError
from torchtitan.preflight.model_fit import check_length
from torchtitan.protocols.model import layers_of
from torchtitan.protocols.model_converter import build_model_converters
from torchtitan.protocols.train_spec import train_spec_of
from torchtitan.runtime.fake_world import fake_world
from torchtitan.tools.logging import logger
from torchtitan.tools.text import first_line

from .collectives import CollectiveRecorder
from .cuda_attention import attention_of_cuda
from .cuda_kernels import kernels_of_cuda
from .inputs import TOKEN_IDS, Inputs, handed_on
from .matrix_exchanges import leaving_out_exchanges, seeing_exchanged
from .memory import PeakMemory
from .records import PassTrace, StageTrace
from .repetition import Repetition, leave_out_layers, repetitions
from .stage import StageTracer, recording


def trace_step(
    job_config: JobConfig,
    shallow: int | None = None,
    dims: ParallelDims | None = None,
    stage: int | None = None,
    inputs: Inputs = TOKEN_IDS,
) -> StageTrace:
    """Trace a step of a valid job within a `fake_world`, on the CPU's code paths.

    In a pipeline, the step is that of a rank with one stage. A compiled job's operations are traced
    as if it were eager, but the activations kept for the backward pass are those the compiler would
    keep.

    Args:
        shallow: 0 for the first of the traces from which a stage is extrapolated, with the fewest
            layers; n for that in which the n-th of `repetitions_of` is longer. None: all layers.
        dims: of the job, if its meshes exist already.
        stage: stage of the pipeline, as if this rank had it. Default: the first stage of this rank.
        inputs: form of a batch.

    Raises:
        ConfigError: a rule of the optimizer matches nothing; a step depends on the values of
            tensors, or has an operator without `register_fake`; or a model with its own loader does
            not take the inputs.
    """
    split = splits_backward(job_config)
    # Fake tensors are not compiled. The chunked loss has a stand-in: see `kernels_of_cuda`.
    chunked = job_config.loss.name == "chunked_cross_entropy"
    components = [name for name in job_config.compile.components if name == "loss" and chunked]
    compiled, job_config = job_config, _with_compile(job_config, components=components)
    spec = train_spec_of(job_config)
    world_size = dist.get_world_size()
    dims = dims or ParallelDims.from_config(job_config.parallelism, world_size)
    if stage is None:
        stage = stages_at(job_config, dims.pp_rank)[0]
    (part,) = _parallel_parts(job_config, dims, shallow, [stage], inputs)
    use_summed_gradients(part)
    compiled_parts: list[nn.Module] = []
    if _compiler_decides(compiled, part):
        compiled = _with_compile(compiled, backend=PARTITIONED, mode="default")
        compiled_parts = _parallel_parts(compiled, dims, shallow, [stage], inputs)
    first = _parallel_parts(job_config, dims, 0, [0], inputs) if stage else []

    memory, recorder = PeakMemory(), CollectiveRecorder(dims.groups())
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with (
        _refusing_unknown(job_config, "model.name"),
        fake,
        seeing_exchanged() as exchanged,
        attention_of_cuda(),
        kernels_of_cuda(split),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        for module in [part, *first, *compiled_parts]:
            use_float8_gathers(module)
            allocate(module, "cpu")
        handed = handed_on(first[0], job_config, dims, inputs) if first else ()
        loss_fn = spec.build_loss_fn(job_config)
        attach_loss(loss_fn, [part])
        built = spec.build_optimizer_fn([part], job_config, dims)
        optimizers = container_of(built, [part], job_config)
        params = list(part.parameters())
        memory.add(*params, *part.buffers())
        with _refusing_unknown(job_config, "optimizer.name"):
            gradients, state = _make_optimizer_state(params, optimizers, memory)
        with memory, recorder:
            trace = StageTracer(
                part, stage, job_config, dims, loss_fn, memory, recorder, inputs, handed, split
            ).run()
            trace.gradients, trace.optimizer_state = gradients, state
            pp_mesh = dims.world_mesh["pp"] if dims.pp_enabled else None
            with recording(recorder, trace.clipping):
                clip_grad_norm(params, job_config.training.max_norm, pp_mesh)
            with _refusing_unknown(job_config, "optimizer.name"):
                _step(optimizers, memory, recorder, trace)
            optimizers.zero_grad()
            trace.exchanged, trace.groups = len(exchanged), recorder.groups
        for like in compiled_parts:
            attach_loss(loss_fn, [like])
            layout = job_config, dims, loss_fn, memory, recorder, inputs, handed
            _keep_as_compiled(trace, StageTracer(like, stage, *layout))
    return trace


def trace_optimizer(
    trace: StageTrace, job_config: JobConfig, dims: ParallelDims, stage: int, inputs: Inputs
) -> None:
    """Trace the optimizer's step on the parameters of all layers of a stage, as in `trace_step`.

    Args:
        trace: of the stage, extrapolated, in which the step replaces the extrapolated one.
    """
    spec = train_spec_of(job_config)
    eager = _with_compile(job_config, components=[])
    (part,) = _parallel_parts(eager, dims, None, [stage], inputs)
    memory, recorder = PeakMemory(), CollectiveRecorder(dims.groups())
    with (
        _refusing_unknown(job_config, "optimizer.name"),
        FakeTensorMode(allow_non_fake_inputs=True),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        allocate(part, "cpu")
        optimizers = container_of(spec.build_optimizer_fn([part], eager, dims), [part], eager)
        params = list(part.parameters())
        memory.add(*params)
        _, trace.optimizer_state = _make_optimizer_state(params, optimizers, memory)
        with memory, recorder:
            _make_gradients(params)
            _step(optimizers, memory, recorder, trace)


def _compiler_decides(job_config: JobConfig, part: nn.Module) -> bool:
    """Whether inductor decides which activations are kept for the backward pass.

    Full checkpointing leaves it no choice. Some activations of experts are outside of its control,
    and would be missed.
    """
    full = job_config.activation_checkpoint.mode == "full"
    return fuses(job_config) and not full and not moe_layers(part)


def _keep_as_compiled(trace: StageTrace, tracer: StageTracer) -> None:
    """Reduce the activations of a trace to those kept by the compiled part of a tracer."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # the compiler's advice is for those who really compile
    problem = None
    try:
        trace.keep(tracer.kept())
    except Exception as error:  # from the compiler, which gets no real device
        problem = first_line(error)
    finally:
        logging.disable(disabled)
    if problem:
        logger.warning(
            "memory is that of an eager run, because the compiler fails here: %s", problem
        )


PARTITIONED = "aot_eager_decomp_partition"
"""A backend of `torch.compile` that keeps the activations inductor would, and compiles nothing."""


def _with_compile(job_config: JobConfig, **settings: Any) -> JobConfig:
    """Return a copy with other options of `[compile]`."""
    copied = copy.copy(job_config)
    copied.compile = dataclasses.replace(job_config.compile, **settings)
    return copied


def try_layout(job_config: JobConfig, world_size: int) -> None:
    """Build the model of a job that passed the other checks, and parallelise it on the meta device.

    Raises:
        ConfigError: the model cannot be split or cut like this, or a rule of the optimizer matches
            nothing.
    """
    with fake_world(world_size, rank=0):
        dims = ParallelDims.from_config(job_config.parallelism, world_size)
        _parallel_parts(job_config, dims, 0, stages_at(job_config, dims.pp_rank), TOKEN_IDS)


def _parallel_parts(
    job_config: JobConfig,
    dims: ParallelDims,
    shallow: int | None,
    stages: list[int],
    inputs: Inputs,
) -> list[nn.Module]:
    """Return these stages of the model, parallelised. Args: as in `trace_step`.

    Raises:
        ConfigError: the model cannot be split or cut like this, a rule of the optimizer matches
            nothing, forward does not take what the job would give it, or `parallelize_fn` does not
            apply context parallelism.
    """
    spec = train_spec_of(job_config)
    model = meta_model(job_config, dims)
    wanted = ModelInputs(model, dims, job_config)
    if inputs.rows is not None:
        training = job_config.training
        wanted.checked(inputs.batch(training.local_batch_size, training.seq_len, "meta"))
    check_rules(model, job_config)
    parts = meta_parts(model, job_config, stages)
    for part in parts:
        if shallow is not None:
            found = repetitions_of(part, job_config, inputs)
            leave_out_layers(part, found, found[shallow - 1] if shallow else None)
    parts = [spec.parallelize(part, dims.world_mesh, dims, job_config) for part in parts]
    if dims.cp_enabled:
        require_applied_cp(parts, job_config)
    if dims.pp_enabled:
        for part in parts:
            part.register_forward_hook(differentiable_outputs)
    return parts


@contextmanager
def _refusing_unknown(job_config: JobConfig, key: str) -> Iterator[None]:
    """Raise `ConfigError` where a step needs more than fake tensors have: values, or a kernel.

    Args:
        key: what the code is of, `model.name` or `optimizer.name`.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
            problem = f"depends on the values of tensors ({error}), which a plan does not have"
            if key == "optimizer.name":
                problem += ". Plan with 'AdamW', which holds at least as much state"
        elif isinstance(error, UnsupportedOperatorException) or "no fake impl" in str(error):
            problem = f"has an operator without register_fake, which a plan needs ({error})"
        else:
            raise
        message = f"{origin(job_config, key)}: cannot be planned, since a step {problem}"
        raise ConfigError(message) from error


def meta_model(job_config: JobConfig, dims: ParallelDims | None = None) -> nn.Module:
    """Return the model on the meta device, with the job's frozen parameters frozen.

    With `dims`, it is converted by `model.converters` as on a device, not as on a CPU.

    Raises:
        ConfigError: it has no layers, from which plans are extrapolated, or the job's sequences
            are too long for it.
    """
    spec = train_spec_of(job_config)
    model_args = spec.updated_args(job_config)
    check_length(spec, model_args, job_config)
    model = spec.meta_model(model_args)
    if not layers_of(model):
        fail(job_config, "model.name", "`layers` is empty: a plan needs a stack of blocks there")
    if dims is not None:
        converters = build_model_converters(job_config, dims)
        each: list[Any] = converters.converters
        for converter in each:
            if hasattr(converter, "require_capability"):
                converter.emulate = converter.options.emulate
        converters.convert(model)
    freeze(model, job_config)
    return model


def meta_parts(model: nn.Module, job_config: JobConfig, stages: list[int]) -> list[nn.Module]:
    """Return the stages of a `meta_model`, which stays whole; without a pipeline, the model."""
    if job_config.parallelism.pipeline_parallel_degree == 1:
        return [model]
    spec = train_spec_of(job_config)
    return split_model(model, job_config, stages, *modules_around_layers(spec.pipeline_fn))


def fuses(config: JobConfig) -> bool:
    """Whether inductor compiles the model's element-wise operations together."""
    return config.compile.compiles("model") and config.compile.backend == "inductor"


def quantizes(config: JobConfig) -> bool:
    """Whether the model has 8-bit products."""
    return any("quantize." in name for name in config.model.converters)


def stages_at(job_config: JobConfig, place: int) -> list[int]:
    """Return the stage numbers at a place in the pipeline; without one, the model is stage 0."""
    if job_config.parallelism.pipeline_parallel_degree == 1:
        return [0]
    return stages_of_rank(job_config, place)


def repetitions_of(part: nn.Module, job_config: JobConfig, inputs: Inputs) -> list[Repetition]:
    """Return the repetitions from which a stage is extrapolated."""
    config = job_config.activation_checkpoint
    every_nth = config.mode == "selective" and config.selective_ac_option != "op"
    period = int(config.selective_ac_option) if every_nth else 1
    return repetitions(part, job_config.training.seq_len, period, inputs)


def _make_optimizer_state(
    params: list[nn.Parameter], optimizers: Any, memory: PeakMemory
) -> tuple[int, int]:
    """Run a first step. Return the bytes of gradients and of the optimizer's state."""
    held = memory.current
    with memory:
        _make_gradients(params)
        gradients = memory.current - held
        with leaving_out_exchanges():  # they leave no state
            optimizers.step()
        state = memory.current - held - gradients
        optimizers.zero_grad()
    return gradients, state


def _make_gradients(params: list[nn.Parameter]) -> None:
    for param in params:
        if param.requires_grad:
            param.grad = torch.zeros_like(param)


def _step(
    optimizers: Any, memory: PeakMemory, recorder: CollectiveRecorder, trace: StageTrace
) -> None:
    """Trace a step of the optimizers into `trace`."""
    held = memory.current
    memory.reset_peak()
    trace.optimizer = PassTrace()
    with recording(recorder, trace.optimizer):
        optimizers.step()
    trace.optimizer_temporary = memory.peak - held
