"""Check the degrees of parallelism against the rest of a job."""

from __future__ import annotations

import math
from itertools import count
from typing import Literal

import torchtitan.models  # noqa: F401  (fills the registry)
from torchtitan.config.batch import batch_shape, batch_sizes
from torchtitan.config.job_config import JobConfig
from torchtitan.config.load import fail
from torchtitan.distributed.parallel_dims import CONFIG_KEYS, ParallelDims
from torchtitan.distributed.pipeline_split import (
    SCHEDULE_KINDS,
    CsvSchedule,
    schedule_splits_backward,
    splits_backward,
    stages_per_rank,
)
from torchtitan.errors import ConfigError, WorldSizeError
from torchtitan.preflight.problems import Problems
from torchtitan.protocols.train_spec import train_spec_of
from torchtitan.runtime import device
from torchtitan.tools.multiples import divisors, nearest_multiples


def layout_problems(job_config: JobConfig, world_size: int) -> Problems:
    """Yield how the degrees of parallelism do not fit the processes, batch, sequence and model."""
    try:
        dims = ParallelDims.from_config(job_config.parallelism, world_size)
    except ConfigError as error:
        problem = str(error).removeprefix("parallelism: ")  # for direct users of ParallelDims
        key = problem.split()[0]  # a degree of experts
        if isinstance(error, WorldSizeError):  # the largest of its factors
            factors = [key for key in CONFIG_KEYS.values() if not key.startswith("expert")]
            key = max(factors, key=lambda name: getattr(job_config.parallelism, name))
        fail(job_config, f"parallelism.{key}", problem, type(error))

    groups = job_config.fault_tolerance.group_size if job_config.fault_tolerance.enable else 1
    batch_sizes(job_config, dims.dp * groups)
    experts = 0
    if dims.ep_enabled or dims.tp_enabled:
        spec = train_spec_of(job_config)
        experts = spec.model_args.num_experts
    yield from _sequence_length(job_config, dims, experts)
    yield from _ring_attention(job_config, dims)
    yield from async_tensor_parallel_problems(job_config)
    if job_config.parallelism.enable_async_tensor_parallel and device.device_type() != "cuda":
        problem = "needs CUDA devices, which can read each other's memory"
        yield "parallelism.enable_async_tensor_parallel", problem
    yield from _experts(job_config, dims, experts)
    if dims.pp_enabled:
        yield from _pipeline(job_config)
    if job_config.training.enable_cpu_offload and not dims.dp_shard_enabled:
        fail(
            job_config,
            "training.enable_cpu_offload",
            "needs sharded parameters (FSDP), but parallelism.data_parallel_shard_degree is "
            f"{dims.dp_shard} with {world_size} processes",
            WorldSizeError,
        )


def _sections(job_config: JobConfig) -> list[Literal["training", "validation"]]:
    """Return the names of the sections that have batches."""
    return ["training", "validation"] if job_config.validation.enable else ["training"]


def _sequence_length(job_config: JobConfig, dims: ParallelDims, experts: int) -> Problems:
    unit, reasons = 1, []
    if dims.cp_enabled:
        unit = 2 * dims.cp
        reasons = [f"parallelism.context_parallel_degree ({dims.cp}) cuts it into {unit} chunks"]
    sequence_parallel = not job_config.parallelism.disable_sequence_parallel
    if dims.tp_enabled and (sequence_parallel or experts):
        unit = math.lcm(unit, dims.cp * dims.tp)
        what = "routes shards of it to the experts"
        if sequence_parallel:
            what = "shards the sequence too, unless parallelism.disable_sequence_parallel is set"
        reasons += [f"parallelism.tensor_parallel_degree ({dims.tp}) {what}"]
    for section in _sections(job_config):
        seq_len = batch_shape(job_config, section)[1]
        if seq_len % unit:
            nearest = nearest_multiples(seq_len, unit)
            problem = f"must be a multiple of {unit}, since {' and '.join(reasons)}"
            yield f"{section}.seq_len", f"{problem}. Nearest: {nearest}"


def _ring_attention(job_config: JobConfig, dims: ParallelDims) -> Problems:
    if not dims.cp_enabled or job_config.parallelism.context_parallel_method != "ring":
        return
    key, others = "parallelism.context_parallel_method", "Use 'allgather' or 'ulysses'"
    if job_config.training.document_mask:
        yield key, f"ring attention does not support training.document_mask. {others}"
    if job_config.model.attention == "flex":
        yield key, f"ring attention does not support flex attention (model.attention). {others}"
    if device.device_type() == "cuda" and job_config.training.mixed_precision_param == "float32":
        yield (
            key,
            "ring attention needs CUDA's flash kernel, which does not support float32. Use "
            "'allgather', 'ulysses' or training.mixed_precision_param = 'bfloat16'",
        )


def async_tensor_parallel_problems(job_config: JobConfig) -> Problems:
    """Yield what async tensor parallelism lacks in a job, on any machine."""
    if not job_config.parallelism.enable_async_tensor_parallel:
        return
    config, key = job_config.compile, "parallelism.enable_async_tensor_parallel"
    if job_config.parallelism.tensor_parallel_degree == 1:
        yield key, "needs parallelism.tensor_parallel_degree of 2 or more"
    if not config.compiles("model") or config.backend != "inductor":
        problem = "needs the compiler: set compile.enable, 'model' in compile.components and "
        yield key, problem + "compile.backend = 'inductor'"
    if job_config.parallelism.disable_sequence_parallel:
        yield key, "needs sequence parallel: set parallelism.disable_sequence_parallel = false"
    quantized = [name for name in job_config.model.converters if name.startswith("quantize.")]
    if quantized:
        # The compiler looks for matrix products next to the collectives, but finds the casts.
        problem = f"has no effect together with {quantized[0]!r} in model.converters"
        yield key, f"{problem}. Remove one of the two"


def _experts(job_config: JobConfig, dims: ParallelDims, experts: int) -> Problems:
    for name in ("expert_parallel_degree", "expert_tensor_parallel_degree"):
        if experts == 0 and getattr(job_config.parallelism, name) > 1:
            yield f"parallelism.{name}", f"must be 1, because {job_config.model} has no experts"
    if experts % dims.ep:
        degrees = ", ".join(map(str, divisors(experts)))
        model = job_config.model
        problem = f"must divide the {experts} experts of {model}. Degrees that do: {degrees}"
        yield "parallelism.expert_parallel_degree", problem


def _pipeline(job_config: JobConfig) -> Problems:
    if splits_backward(job_config):
        yield from _split_backward(job_config)
    size = job_config.parallelism.pipeline_parallel_microbatch_size
    microbatches: dict[str, int] = {}
    for section in _sections(job_config):
        batch = batch_shape(job_config, section)[0]
        if batch % size:
            yield (
                f"{section}.local_batch_size",
                f"must be a multiple of parallelism.pipeline_parallel_microbatch_size ({size}). "
                f"Nearest: {nearest_multiples(batch, size)}",
            )
        microbatches[section] = batch // size
    csv = job_config.parallelism.pipeline_parallel_schedule_csv
    yield from (_csv_schedule if csv else _schedule)(job_config, microbatches)


def _split_backward(job_config: JobConfig) -> Problems:
    """Yield options that conflict with a separate backward pass for weights (zero bubble)."""
    if job_config.loss.name == "chunked_cross_entropy":
        yield (
            "loss.name",
            "computes its gradients only once, but this pipeline schedule needs them twice, for "
            "inputs and for weights. Use 'cross_entropy', or another schedule",
        )
    if job_config.parallelism.fsdp_reshard_after_forward == "always":
        # PyTorch looks for the unsharded parameters in the autograd graph, and would skip those
        # that have been resharded by then.
        yield (
            "parallelism.fsdp_reshard_after_forward",
            "'always' would lose weight gradients, because this pipeline schedule computes them "
            "separately from input gradients (zero bubble). Use 'default' or 'never', or another "
            "schedule",
        )


def _csv_schedule(job_config: JobConfig, microbatches: dict[str, int]) -> Problems:
    """Check the number of micro-batches of each section against the schedule file."""
    needed, parallelism = CsvSchedule.read(job_config).microbatches, job_config.parallelism
    size = parallelism.pipeline_parallel_microbatch_size
    for section, number in microbatches.items():
        if number != needed:
            yield (
                f"{section}.local_batch_size",
                f"must be {needed * size}: the schedule in "
                f"{parallelism.pipeline_parallel_schedule_csv} has {needed} micro-batches of "
                f"parallelism.pipeline_parallel_microbatch_size ({size}) sequences",
            )


def _schedule(job_config: JobConfig, microbatches: dict[str, int]) -> Problems:
    """Check stages per rank, and the number of micro-batches of each section, for the schedule."""
    parallelism = job_config.parallelism
    schedule, pp = parallelism.pipeline_parallel_schedule, parallelism.pipeline_parallel_degree
    per_rank = stages_per_rank(job_config)
    stages, right = {
        "single": ("1 stage", per_rank == 1),
        "looped": ("2 or more stages", per_rank >= 2),
        "V": ("2 stages", per_rank == 2),
    }[SCHEDULE_KINDS[schedule]]
    if not right:
        problem = f"{schedule} needs {stages} per rank"
        yield "parallelism.pipeline_parallel_stages_per_rank", problem
    whole_graph = job_config.compile.compiles("model") and job_config.compile.scope == "model"
    if whole_graph and schedule_splits_backward(job_config):
        yield (
            "compile.scope",
            f"PyTorch does not run {schedule} on stages that are compiled as a whole. Use 'block', "
            "or another schedule",
        )

    def problem_of(number: int, pp: int) -> str:
        return _microbatch_problem(schedule, number, pp, pp * per_rank)

    size = parallelism.pipeline_parallel_microbatch_size
    for section, number in microbatches.items():
        if problem := problem_of(number, pp):
            more = next(n for n in count(number) if not problem_of(n, pp))
            fewer = next((n for n in range(pp, 1, -1) if not problem_of(number, n)), 1)
            yield (
                f"{section}.local_batch_size",
                f"gives {number} micro-batches of {size} sequences, but {schedule} over {pp} "
                f"ranks needs {problem}. Nearest: {section}.local_batch_size = {more * size}, or "
                f"parallelism.pipeline_parallel_degree = {fewer}",
            )


def _microbatch_problem(schedule: str, microbatches: int, pp: int, stages: int) -> str:
    """Return what the schedule needs if it cannot run this number of micro-batches, else ""."""
    if schedule in ("1F1B", "DualPipeV") and microbatches < stages:
        return f"at least {stages}, one per stage"
    if schedule in ("Interleaved1F1B", "InterleavedZeroBubble"):
        # These schedules run in equal rounds of about `pp` micro-batches.
        rounds = max(1, microbatches // pp)
        if microbatches % rounds:
            return f"fewer than {2 * pp}, or for example a multiple of {pp}"
    return ""
