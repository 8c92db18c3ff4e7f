"""Check the degrees of parallelism against the rest of a job."""

from __future__ import annotations

import math
from itertools import count
from typing import Literal

import torchtitan.models  # noqa: F401  (fills the registry)
from torchtitan.config.batch import batch_shape, resolve_batch
from torchtitan.config.job_config import JobConfig
from torchtitan.config.load import fail
from torchtitan.distributed.parallel_dims import CONFIG_KEYS, ParallelDims
from torchtitan.distributed.pipeline_split import (
    SCHEDULE_KINDS,
    CsvSchedule,
    splits_backward,
    stages_per_rank,
)
from torchtitan.errors import ConfigError, WorldSizeError
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.runtime import device
from torchtitan.tools.multiples import divisors, nearest_multiples


def check_layout(job_config: JobConfig, world_size: int) -> None:
    """Check the degrees of parallelism against the processes, batch, sequence and model."""
    degrees = {key: getattr(job_config.parallelism, key) for key in CONFIG_KEYS.values()}
    try:
        dims = ParallelDims.from_config(job_config.parallelism, world_size)
    except ConfigError as error:
        largest = max(degrees, key=degrees.__getitem__)
        problem = str(error).removeprefix("parallelism: ")  # for direct users of ParallelDims
        fail(job_config, f"parallelism.{largest}", problem, type(error))

    groups = job_config.fault_tolerance.group_size if job_config.fault_tolerance.enable else 1
    resolve_batch(job_config, dims.dp * groups)
    experts = 0
    if dims.ep_enabled or dims.tp_enabled:
        spec = get_train_spec(job_config.model.name, job_config.model.flavor)
        experts = spec.model_args.num_experts
    _check_sequence_length(job_config, dims, experts)
    _check_context_parallel(job_config, dims)
    _check_tensor_parallel(job_config, dims)
    _check_experts(job_config, dims, experts)
    if dims.pp_enabled:
        _check_pipeline(job_config)
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


def _check_sequence_length(job_config: JobConfig, dims: ParallelDims, experts: int) -> None:
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
            fail(
                job_config,
                f"{section}.seq_len",
                f"must be a multiple of {unit}, since {' and '.join(reasons)}. Nearest: "
                f"{nearest_multiples(seq_len, unit)}",
            )


def _check_context_parallel(job_config: JobConfig, dims: ParallelDims) -> None:
    if not dims.cp_enabled or job_config.parallelism.context_parallel_method != "ring":
        return
    key = "parallelism.context_parallel_method"
    if job_config.training.document_mask:
        problem = (
            "ring attention does not support training.document_mask. Use 'allgather' or 'ulysses'"
        )
        fail(job_config, key, problem)
    if job_config.model.attention == "flex":
        problem = (
            "ring attention does not support flex attention (model.attention). Use 'allgather' or "
            "'ulysses'"
        )
        fail(job_config, key, problem)
    if device.device_type() == "cuda" and job_config.training.mixed_precision_param == "float32":
        fail(
            job_config,
            key,
            "ring attention needs CUDA's flash kernel, which does not support float32. Use "
            "'allgather', 'ulysses' or training.mixed_precision_param = 'bfloat16'",
        )


def _check_tensor_parallel(job_config: JobConfig, dims: ParallelDims) -> None:
    if not job_config.parallelism.enable_async_tensor_parallel:
        return
    config, key = job_config.compile, "parallelism.enable_async_tensor_parallel"
    if not dims.tp_enabled:
        fail(job_config, key, "needs parallelism.tensor_parallel_degree of 2 or more")
    if device.device_type() != "cuda":
        fail(job_config, key, "needs CUDA devices, which can read each other's memory")
    if not config.compiles("model") or config.backend != "inductor":
        problem = "needs the compiler: set compile.enable, 'model' in compile.components and "
        fail(job_config, key, problem + "compile.backend = 'inductor'")
    if job_config.parallelism.disable_sequence_parallel:
        problem = "needs sequence parallel: set parallelism.disable_sequence_parallel = false"
        fail(job_config, key, problem)
    quantized = [name for name in job_config.model.converters if name.startswith("quantize.")]
    if quantized:
        # The compiler looks for matrix products next to the collectives, but finds the casts.
        problem = (
            f"has no effect together with {quantized[0]!r} in model.converters. Remove one of the "
            "two"
        )
        fail(job_config, key, problem)


def _check_experts(job_config: JobConfig, dims: ParallelDims, experts: int) -> None:
    model = job_config.model
    for name in ("expert_parallel_degree", "expert_tensor_parallel_degree"):
        if experts == 0 and getattr(job_config.parallelism, name) > 1:
            problem = f"must be 1, because {model.name} {model.flavor} has no experts"
            fail(job_config, f"parallelism.{name}", problem)
    if experts % dims.ep:
        fail(
            job_config,
            "parallelism.expert_parallel_degree",
            f"must divide the {experts} experts of {model.name} {model.flavor}. Degrees that do: "
            f"{', '.join(map(str, divisors(experts)))}",
        )


def _check_pipeline(job_config: JobConfig) -> None:
    if splits_backward(job_config):
        _check_split_backward(job_config)
    size = job_config.parallelism.pipeline_parallel_microbatch_size
    microbatches: dict[str, int] = {}
    for section in _sections(job_config):
        batch = batch_shape(job_config, section)[0]
        if batch % size:
            fail(
                job_config,
                f"{section}.local_batch_size",
                f"must be a multiple of parallelism.pipeline_parallel_microbatch_size ({size}). "
                f"Nearest: {nearest_multiples(batch, size)}",
            )
        microbatches[section] = batch // size
    if job_config.parallelism.pipeline_parallel_schedule_csv:
        _check_csv_schedule(job_config, microbatches)
    else:
        _check_schedule(job_config, microbatches)


def _check_split_backward(job_config: JobConfig) -> None:
    """Refuse options that conflict with a separate backward pass for weights (zero bubble)."""
    if job_config.loss.name == "chunked_cross_entropy":
        fail(
            job_config,
            "loss.name",
            "computes its gradients only once, but this pipeline schedule needs them twice, for "
            "inputs and for weights. Use 'cross_entropy', or another schedule",
        )
    if job_config.parallelism.fsdp_reshard_after_forward == "always":
        # PyTorch looks for the unsharded parameters in the autograd graph, and would skip those
        # that have been resharded by then.
        fail(
            job_config,
            "parallelism.fsdp_reshard_after_forward",
            "'always' would lose weight gradients, because this pipeline schedule computes them "
            "separately from input gradients (zero bubble). Use 'default' or 'never', or another "
            "schedule",
        )


def _check_csv_schedule(job_config: JobConfig, microbatches: dict[str, int]) -> None:
    """Check the number of micro-batches of each section against the schedule file."""
    needed = CsvSchedule.read(job_config).microbatches
    size = job_config.parallelism.pipeline_parallel_microbatch_size
    for section, number in microbatches.items():
        if number != needed:
            fail(
                job_config,
                f"{section}.local_batch_size",
                f"must be {needed * size}: the schedule in "
                f"{job_config.parallelism.pipeline_parallel_schedule_csv} has {needed} "
                f"micro-batches of parallelism.pipeline_parallel_microbatch_size ({size}) "
                "sequences",
            )


def _check_schedule(job_config: JobConfig, microbatches: dict[str, int]) -> None:
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
        fail(job_config, "parallelism.pipeline_parallel_stages_per_rank", problem)

    def problem_of(number: int, pp: int) -> str:
        return _microbatch_problem(schedule, number, pp, pp * per_rank)

    size = parallelism.pipeline_parallel_microbatch_size
    for section, number in microbatches.items():
        if problem := problem_of(number, pp):
            more = next(n for n in count(number) if not problem_of(n, pp))
            fewer = next((n for n in range(pp, 1, -1) if not problem_of(number, n)), 1)
            fail(
                job_config,
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
