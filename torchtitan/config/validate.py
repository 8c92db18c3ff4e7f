"""Rules between sections, checked before a mesh is built and before weights are allocated.

Each message opens with where the value comes from: the line of the TOML file, or the key.
Imports of torch and of the registries are inside functions, so that `torchtitan.config` is light.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from typing import TYPE_CHECKING, Any

from torchtitan.errors import ConfigError, did_you_mean

from .job_config import JobConfig
from .load import fail, origin
from .survival_rules import check_survival

if TYPE_CHECKING:
    from torchtitan.distributed.parallel_dims import ParallelDims

_DATASETS_WITH_PATH = {
    "text": "a file, a glob or a folder",
    "jsonl": "a file, a glob or a folder",
    "parquet": "a file, a glob or a folder",
    "arrow": "a file, a glob or a folder",
    "tokens": "a folder of `torchtitan data prepare`, or .bin files",
    "hf": "a repository of the Hugging Face hub, or a local copy",
}


def resolve_batch(job_config: JobConfig, dp_world_size: int) -> tuple[int, int]:
    """`(global_batch_size, accumulation_steps)`: sequences in a step, and forward passes of a rank.

    Raises:
        ConfigError: `training.global_batch_size` is not a whole number of passes of all ranks.
    """
    training = job_config.training
    one_pass = training.local_batch_size * dp_world_size
    if training.global_batch_size == -1:
        return one_pass, 1
    if training.global_batch_size % one_pass:
        fail(
            job_config,
            "training.global_batch_size",
            f"must be a multiple of training.local_batch_size ({training.local_batch_size}) x data "
            f"ranks ({dp_world_size}) = {one_pass}. "
            f"Nearest: {_nearest_multiples(training.global_batch_size, one_pass)}"
            f"{_fitting_data_ranks(training.global_batch_size, training.local_batch_size)}",
        )
    return training.global_batch_size, training.global_batch_size // one_pass


def _fitting_data_ranks(global_batch_size: int, local_batch_size: int) -> str:
    """The end of a message: for a job whose number of ranks changes, the others that work."""
    passes, rest = divmod(global_batch_size, local_batch_size)
    if rest:
        return ""
    fitting = [str(ranks) for ranks in range(1, passes + 1) if passes % ranks == 0]
    shown = ", ".join(fitting[:8]) + (", ..." if len(fitting) > 8 else "")
    return f". {global_batch_size} works on these numbers of data ranks: {shown}"


def validate(job_config: JobConfig, world_size: int) -> None:
    """Check the rules between sections for a run of `world_size` processes.

    Custom imports must be done before, as they may register datasets.

    Raises:
        ConfigError: a rule is broken.
    """
    _check_parallelism(job_config, world_size)
    _check_data(job_config)
    _check_optimizer(job_config)
    _check_activation_checkpoint(job_config)
    _check_compile(job_config)
    check_survival(job_config)
    _check_compile_mode(job_config, world_size)
    _check_outputs(job_config)


def _check_parallelism(job_config: JobConfig, world_size: int) -> None:
    from torchtitan.distributed.parallel_dims import CONFIG_KEYS, ParallelDims

    degrees = {key: getattr(job_config.parallelism, key) for key in CONFIG_KEYS.values()}
    try:
        dims = ParallelDims.from_config(job_config.parallelism, world_size)
    except ConfigError as error:
        largest = max(degrees, key=degrees.__getitem__)
        problem = str(error).removeprefix("parallelism: ")  # of those who build ParallelDims
        raise ConfigError(f"{origin(job_config, f'parallelism.{largest}')}: {problem}") from error

    groups = job_config.fault_tolerance.group_size if job_config.fault_tolerance.enable else 1
    resolve_batch(job_config, dims.dp * groups)
    _check_sequence_length(job_config, dims)
    _check_context_parallel(job_config, dims)
    _check_tensor_parallel(job_config, dims)
    _check_experts(job_config, dims)
    if dims.pp_enabled:
        _check_pipeline(job_config)
    if job_config.training.enable_cpu_offload and not dims.dp_shard_enabled:
        fail(
            job_config,
            "training.enable_cpu_offload",
            "needs sharded parameters (FSDP), but parallelism.data_parallel_shard_degree comes to "
            f"{dims.dp_shard} with {world_size} processes",
        )


def _check_sequence_length(job_config: JobConfig, dims: ParallelDims) -> None:
    unit, reasons = 1, []
    if dims.cp_enabled:
        unit = 2 * dims.cp
        reasons = [f"parallelism.context_parallel_degree ({dims.cp}) cuts it in {unit} chunks"]
    if dims.tp_enabled and not job_config.parallelism.disable_sequence_parallel:
        unit = math.lcm(unit, dims.cp * dims.tp)
        reasons += [f"parallelism.tensor_parallel_degree ({dims.tp}) shards the sequence too"]
    sections = ["training", "validation"] if job_config.validation.enable else ["training"]
    for section in sections:
        seq_len = getattr(job_config, section).seq_len
        if seq_len % unit:
            fail(
                job_config,
                f"{section}.seq_len",
                f"must be a multiple of {unit}, since {' and '.join(reasons)}. "
                f"Nearest: {_nearest_multiples(seq_len, unit)}",
            )


def _check_context_parallel(job_config: JobConfig, dims: ParallelDims) -> None:
    if not dims.cp_enabled or job_config.parallelism.context_parallel_method != "ring":
        return
    from torchtitan.distributed.utils import device_type

    key = "parallelism.context_parallel_method"
    if job_config.training.document_mask:
        problem = "a ring knows no training.document_mask. Use 'allgather' or 'ulysses'"
        fail(job_config, key, problem)
    if job_config.model.attention == "flex":
        problem = "a ring has no flex attention (model.attention). Use 'allgather' or 'ulysses'"
        fail(job_config, key, problem)
    if device_type() == "cuda" and job_config.training.mixed_precision_param == "float32":
        fail(
            job_config,
            key,
            "the flash kernel of CUDA, which a ring needs, has no float32. Use 'allgather', "
            "'ulysses' or training.mixed_precision_param = 'bfloat16'",
        )


def _check_tensor_parallel(job_config: JobConfig, dims: ParallelDims) -> None:
    if not job_config.parallelism.enable_async_tensor_parallel:
        return
    from torchtitan.distributed.utils import device_type

    config, key = job_config.compile, "parallelism.enable_async_tensor_parallel"
    if not dims.tp_enabled:
        fail(job_config, key, "needs parallelism.tensor_parallel_degree of 2 or more")
    if device_type() != "cuda":
        fail(job_config, key, "needs CUDA, whose devices can read each other's memory")
    if not config.enable or "model" not in config.components or config.backend != "inductor":
        problem = "the compiler does it: set compile.enable, 'model' in compile.components and "
        fail(job_config, key, problem + "compile.backend = 'inductor'")
    if job_config.parallelism.disable_sequence_parallel:
        problem = "needs sequence parallel: set parallelism.disable_sequence_parallel = false"
        fail(job_config, key, problem)


def _check_experts(job_config: JobConfig, dims: ParallelDims) -> None:
    if not (dims.ep_enabled or dims.tp_enabled):
        return
    import torchtitan.models  # noqa: F401  (fills the registry)
    from torchtitan.protocols.train_spec import get_train_spec

    model = job_config.model
    experts = get_train_spec(model.name, model.flavor).model_args.num_experts
    if experts == 0:
        for name in ("expert_parallel_degree", "expert_tensor_parallel_degree"):
            if getattr(job_config.parallelism, name) > 1:
                problem = f"{model.name} {model.flavor} has no experts. Use 1"
                fail(job_config, f"parallelism.{name}", problem)
        return
    if experts % dims.ep:
        degrees = [d for d in range(1, experts + 1) if experts % d == 0]
        fail(
            job_config,
            "parallelism.expert_parallel_degree",
            f"must divide the {experts} experts of {model.name} {model.flavor}. Degrees that do: "
            f"{', '.join(map(str, degrees))}",
        )
    unit = dims.cp * dims.tp  # each rank routes its part of the sequence
    sections = ["training", "validation"] if job_config.validation.enable else ["training"]
    for section in sections:
        seq_len = getattr(job_config, section).seq_len
        if dims.tp_enabled and seq_len % unit:
            fail(
                job_config,
                f"{section}.seq_len",
                f"must be a multiple of {unit}, since each rank of tensor parallel routes a part "
                f"of the sequence to experts. Nearest: {_nearest_multiples(seq_len, unit)}",
            )


def _check_pipeline(job_config: JobConfig) -> None:
    from torchtitan.distributed.pipeline_split import (
        SCHEDULE_KINDS,
        CsvSchedule,
        splits_backward,
        stages_per_rank,
    )

    if job_config.loss.name == "chunked_cross_entropy" and splits_backward(job_config):
        fail(
            job_config,
            "loss.name",
            "has its gradients once, and this pipeline schedule asks twice, for inputs and for "
            "weights. Use 'cross_entropy', or another schedule",
        )

    parallelism = job_config.parallelism
    size = parallelism.pipeline_parallel_microbatch_size
    sections = ["training", "validation"] if job_config.validation.enable else ["training"]
    for section in sections:
        batch = getattr(job_config, section).local_batch_size
        if batch % size:
            fail(
                job_config,
                f"{section}.local_batch_size",
                f"must be a multiple of parallelism.pipeline_parallel_microbatch_size ({size}). "
                f"Nearest: {_nearest_multiples(batch, size)}",
            )
    if parallelism.pipeline_parallel_schedule_csv:
        needed = CsvSchedule.read(job_config).microbatches
        for section in sections:
            if getattr(job_config, section).local_batch_size != needed * size:
                fail(
                    job_config,
                    f"{section}.local_batch_size",
                    f"must be {needed * size}: the schedule in "
                    f"{parallelism.pipeline_parallel_schedule_csv} has {needed} micro-batches, of "
                    f"parallelism.pipeline_parallel_microbatch_size ({size})",
                )
        return

    schedule, pp = parallelism.pipeline_parallel_schedule, parallelism.pipeline_parallel_degree
    per_rank = stages_per_rank(job_config)
    kind = SCHEDULE_KINDS[schedule]
    stages = {"single": "1 stage", "looped": "2 or more stages", "V": "2 stages"}[kind]
    if not {"single": per_rank == 1, "looped": per_rank >= 2, "V": per_rank == 2}[kind]:
        problem = f"{schedule} needs {stages} a rank"
        fail(job_config, "parallelism.pipeline_parallel_stages_per_rank", problem)

    for section in sections:
        microbatches = getattr(job_config, section).local_batch_size // size
        problem = _microbatch_problem(schedule, microbatches, pp, pp * per_rank)
        if problem:
            more = microbatches
            while _microbatch_problem(schedule, more, pp, pp * per_rank):
                more += 1
            fewer = pp
            while fewer > 1 and _microbatch_problem(
                schedule, microbatches, fewer, fewer * per_rank
            ):
                fewer -= 1
            fail(
                job_config,
                f"{section}.local_batch_size",
                f"makes {microbatches} micro-batches of {size}; {schedule} over {pp} ranks needs "
                f"{problem}. Nearest: {section}.local_batch_size = {more * size}, or "
                f"parallelism.pipeline_parallel_degree = {fewer}",
            )


def _microbatch_problem(schedule: str, microbatches: int, pp: int, stages: int) -> str:
    """What is wrong with the number of micro-batches; "" if nothing is."""
    if schedule in ("1F1B", "DualPipeV") and microbatches < stages:
        return f"at least {stages}, one for each stage"
    if schedule in ("Interleaved1F1B", "InterleavedZeroBubble"):
        # They go in rounds of about `pp` micro-batches, all of one size.
        rounds = max(1, microbatches // pp)
        if microbatches % rounds:
            return f"fewer than {2 * pp}, or a multiple of {pp}"
    return ""


def _check_data(job_config: JobConfig) -> None:
    data = job_config.data
    for i, source in enumerate(data.sources):
        _check_dataset(job_config, f"data.sources.{i}", source)
    if not data.sources:
        _check_dataset(job_config, "training", job_config.training)
    if job_config.validation.enable:
        _check_dataset(job_config, "validation", job_config.validation)

    names = [source.name or source.dataset for source in data.sources]
    for i, name in enumerate(names):
        if name in names[:i]:
            problem = f"{name!r} is the name of another source too. Give each a name of its own"
            fail(job_config, f"data.sources.{i}.name", problem)
    if data.sources and not any(source.weight for source in data.sources):
        fail(job_config, "data.sources", "all weights are 0")
    begins = [phase.from_step for phase in data.phases]
    for i, phase in enumerate(data.phases):
        if not data.sources:
            fail(job_config, "data.phases", "needs data.sources, whose weights it changes")
        if len(phase.weights) != len(data.sources):
            problem = f"must have one for each of data.sources, {len(data.sources)} in all"
            fail(job_config, f"data.phases.{i}.weights", problem)
        if not any(phase.weights):
            fail(job_config, f"data.phases.{i}.weights", "all weights are 0")
        if i and begins[i] <= begins[i - 1]:
            problem = f"must be more than that of the phase before, {begins[i - 1]}"
            fail(job_config, f"data.phases.{i}.from_step", problem)

    path = job_config.model.tokenizer_path
    if path != "bytes" and not os.path.isfile(
        os.path.join(os.path.expanduser(path), "tokenizer.json")
    ):
        fail(
            job_config,
            "model.tokenizer_path",
            "not a folder with a Hugging Face tokenizer.json. Use such a folder, or 'bytes', which "
            "needs no file",
        )


def _check_dataset(job_config: JobConfig, section: str, config: Any) -> None:
    from torchtitan.data.sources import DATASETS

    if config.dataset not in DATASETS:
        problem = f"no such dataset.{did_you_mean(config.dataset, DATASETS)}"
        fail(job_config, f"{section}.dataset", problem)
    if config.dataset in _DATASETS_WITH_PATH and not config.dataset_path:
        problem = f"needs {section}.dataset_path: {_DATASETS_WITH_PATH[config.dataset]}"
        fail(job_config, f"{section}.dataset", problem)


def _check_optimizer(job_config: JobConfig) -> None:
    from torchtitan.components.optimizer import OPTIMIZERS

    name = job_config.optimizer.name
    if name not in OPTIMIZERS:
        problem = f"no such optimizer.{did_you_mean(name, OPTIMIZERS)}"
        fail(job_config, "optimizer.name", problem)
    for i, rule in enumerate(job_config.optimizer.rules):
        key = f"optimizer.rules.{i}"
        if not rule.pattern:
            fail(job_config, key, "needs a pattern")
        try:
            re.compile(rule.pattern)
        except (re.error, OverflowError, RecursionError) as error:
            fail(job_config, f"{key}.pattern", f"not a regular expression: {error}")


def _check_activation_checkpoint(job_config: JobConfig) -> None:
    from torchtitan.distributed.pipeline_split import splits_backward

    config, compile_config = job_config.activation_checkpoint, job_config.compile
    option = config.selective_ac_option
    if option != "op" and not re.fullmatch("[1-9][0-9]{0,8}", option):
        problem = "must be 'op', or a positive integer N for every N-th block"
        fail(job_config, "activation_checkpoint.selective_ac_option", problem)
    compiles_model = compile_config.enable and "model" in compile_config.components
    per_op = config.mode == "selective" and option == "op"
    if per_op and splits_backward(job_config) and not compiles_model:
        fail(
            job_config,
            "activation_checkpoint.selective_ac_option",
            "keeps activations for one backward pass, and this pipeline schedule makes two, for "
            "inputs and for weights. Use activation_checkpoint.mode 'full' or 'none', a number N, "
            "or set compile.enable",
        )
    parallelism = job_config.parallelism
    shared = max(parallelism.tensor_parallel_degree, parallelism.context_parallel_degree) > 1
    if config.mode == "memory_budget" and shared:
        problem = (
            "the compiler cannot weigh blocks that communicate, as under tensor and context "
            "parallelism (torch 2.13). Use 'selective' or 'full'"
        )
        fail(job_config, "activation_checkpoint.mode", problem)
    if config.mode == "memory_budget" and not compiles_model:
        problem = "the compiler does it: set compile.enable, with 'model' in compile.components"
        fail(job_config, "activation_checkpoint.mode", problem)


def _check_compile(job_config: JobConfig) -> None:
    config = job_config.compile
    if not config.enable or config.backend == "inductor":
        return
    from torch._dynamo import list_backends

    known = list_backends(exclude_tags=())
    if config.backend not in known:
        fail(
            job_config, "compile.backend", f"no such backend.{did_you_mean(config.backend, known)}"
        )


def _check_compile_mode(job_config: JobConfig, world_size: int) -> None:
    from torchtitan.distributed.utils import device_type

    config, key = job_config.compile, "compile.mode"
    if config.mode == "default":
        return
    if not config.enable or "model" not in config.components or config.backend != "inductor":
        problem = "set compile.enable, 'model' in compile.components and compile.backend = "
        fail(job_config, key, f"{problem}'inductor', which alone has modes")
    if config.mode == "max-autotune-no-cudagraphs":
        return
    if device_type() != "cuda":
        problem = "CUDA graphs need a GPU. Use 'default' or 'max-autotune-no-cudagraphs'"
        fail(job_config, key, problem)
    if world_size > 1:
        problem = (
            "a CUDA graph reads weights where they were when it was captured, and with several "
            "ranks they are gathered anew each time. Use 'default' or 'max-autotune-no-cudagraphs'"
        )
        fail(job_config, key, problem)


def _check_outputs(job_config: JobConfig) -> None:
    folder = existing = os.path.abspath(job_config.job.dump_folder)
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        fail(job_config, "job.dump_folder", f"{existing} is a file, not a folder")
    if not os.access(existing, os.W_OK):
        fail(job_config, "job.dump_folder", f"cannot write {folder}: no permission in {existing}")

    checkpoint = job_config.checkpoint
    if checkpoint.load_step != -1 and not checkpoint.enable:
        problem = "nothing would be loaded, since checkpoint.enable is false"
        fail(job_config, "checkpoint.load_step", problem)
    _check_initial_load(job_config)
    _check_storage(job_config)
    if checkpoint.last_save_in_hf and not checkpoint.enable:
        problem = "nothing would be saved, since checkpoint.enable is false"
        fail(job_config, "checkpoint.last_save_in_hf", problem)
    if job_config.metrics.enable_wandb and importlib.util.find_spec("wandb") is None:
        problem = "wandb is not installed: pip install 'torchtitan[wandb]'"
        fail(job_config, "metrics.enable_wandb", problem)


def _check_storage(job_config: JobConfig) -> None:
    checkpoint = job_config.checkpoint
    for key in ("folder", "initial_load_path"):
        if "://" in getattr(checkpoint, key):
            from torchtitan.components.checkpoint.storage import RemotePath, storage_path

            try:
                path = storage_path(getattr(checkpoint, key))
            except ConfigError as error:
                raise ConfigError(f"checkpoint.{key} = {error}") from error
            if key == "folder" and checkpoint.last_save_in_hf and isinstance(path, RemotePath):
                problem = "is written to local folders only, and checkpoint.folder is a URL. Use "
                problem += "`torchtitan convert to-hf` on a local copy of the last checkpoint"
                fail(job_config, "checkpoint.last_save_in_hf", problem)


def _check_initial_load(job_config: JobConfig) -> None:
    in_hf, path = job_config.checkpoint.initial_load_in_hf, job_config.checkpoint.initial_load_path
    key = "checkpoint.initial_load_path" if path else "checkpoint.initial_load_in_hf"
    if in_hf and not path:
        path = job_config.model.tokenizer_path
        if path == "bytes":
            problem = (
                "needs a Hugging Face folder: set checkpoint.initial_load_path, or "
                "model.tokenizer_path if the weights lie with the tokenizer"
            )
            fail(job_config, key, problem)
    if not path:
        return
    if "://" in path:
        if in_hf:
            fail(job_config, key, "Hugging Face folders are read from local folders only")
        return  # looked at where it is opened
    folder = os.path.expanduser(path)
    if not os.path.isdir(folder):
        fail(job_config, key, "no such folder")
    names = ("model.safetensors.index.json", "model.safetensors")
    if in_hf and not any(os.path.isfile(os.path.join(folder, name)) for name in names):
        problem = f"{path} holds no Hugging Face weights ({' or '.join(names)})"
        fail(job_config, key, problem)


def _nearest_multiples(value: int, unit: int) -> str:
    """The multiples of `unit` around `value`, which is none itself: `96 or 104`."""
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else f"{unit}"
