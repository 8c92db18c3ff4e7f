"""Check the rules between sections, before a mesh is built and weights are allocated.

Each message begins with the origin of the value: the line of the TOML file, or the key.
"""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch._dynamo import list_backends

from torchtitan.components.checkpoint.manifest import is_hf_weights
from torchtitan.components.checkpoint.safetensors_files import SAFETENSORS_FILE, SAFETENSORS_INDEX
from torchtitan.components.checkpoint.storage import RemotePath, storage_path
from torchtitan.components.optimizer import OPTIMIZERS
from torchtitan.config.batch import batch_sizes
from torchtitan.config.data import DataSource
from torchtitan.config.job_config import JobConfig
from torchtitan.config.optimizer import Optimizer
from torchtitan.config.upstream import value_instead
from torchtitan.data.sources import DATASETS
from torchtitan.errors import ConfigError, begin_errors_with, did_you_mean
from torchtitan.preflight.layout_rules import layout_problems
from torchtitan.preflight.problems import Problems, refuse
from torchtitan.preflight.survival_rules import survival_problems
from torchtitan.runtime import device
from torchtitan.tools.foreign_files import exists, is_folder
from torchtitan.tools.text import is_url

_DATASETS_WITH_PATH = {
    "text": "a file, a glob or a folder",
    "jsonl": "a file, a glob or a folder",
    "parquet": "a file, a glob or a folder",
    "arrow": "a file, a glob or a folder",
    "tokens": "a folder made by `torchtitan data prepare`, or .bin files",
    "hf": "a repository of the Hugging Face hub, or a local copy",
}
_ADAM_DECAYS = ("beta1", "beta2")
_DECAYS = {"AdamW": _ADAM_DECAYS, "Adam": _ADAM_DECAYS, "Muon": ("momentum", *_ADAM_DECAYS)}
"""Maps `optimizer.name` to the keys of how slowly its state changes."""
_MOST_DECAY = 0.99
"""Of state in bfloat16, whose numbers are 0.4 to 0.8% apart. With a `beta2` of 0.999, the second
moment no longer falls when gradients do, and stays hundreds of times too large."""


def validate(job_config: JobConfig, world_size: int) -> None:
    """Check the rules between sections for a run of `world_size` processes.

    Do custom imports first, as they may register datasets.
    """
    refuse(_problems(job_config, world_size), job_config)


def _problems(job_config: JobConfig, world_size: int) -> Problems:
    yield from layout_problems(job_config, world_size)
    yield from _datasets(job_config)
    yield from _phases(job_config)
    yield from _optimizer(job_config)
    yield from _schedule(job_config)
    yield from _activation_checkpoint(job_config)
    yield from _compile_backend(job_config)
    yield from survival_problems(job_config)
    yield from _compile_mode(job_config, world_size)
    yield from _profiling(job_config, world_size)
    yield from _outputs(job_config)


def _datasets(job_config: JobConfig) -> Problems:
    sections: list[tuple[str, Any, str]] = [("training", job_config.training, "data")]
    if job_config.validation.enable:
        sections.append(("validation", job_config.validation, "validation"))
    for section, config, holder in sections:
        key = f"{holder}.sources"
        sources = getattr(job_config, holder).sources
        if not sources:
            yield from _dataset(section, config)
            continue
        for i, source in enumerate(sources):
            yield from _dataset(f"{key}.{i}", source)
        yield from _sources(key, sources)
        yield from _dataset_beside_sources(section, config, key)


def _dataset(section: str, config: Any) -> Problems:
    key, name = f"{section}.dataset", config.dataset
    if name not in DATASETS:
        hint = value_instead(key, name, DATASETS) or did_you_mean(name, DATASETS)
        yield key, f"no such dataset.{hint}"
    if name in _DATASETS_WITH_PATH and not config.dataset_path:
        yield key, f"needs {section}.dataset_path: {_DATASETS_WITH_PATH[name]}"


def _sources(key: str, sources: list[DataSource]) -> Problems:
    names = [source.name or source.dataset for source in sources]
    for i, name in enumerate(names):
        if name in names[:i]:
            problem = f"{name!r} is also the name of another source. Give each source its own name"
            yield f"{key}.{i}.name", problem
    if not any(source.weight for source in sources):
        yield key, "all weights are 0"


def _dataset_beside_sources(section: str, config: Any, key: str) -> Problems:
    names = ["dataset", "dataset_path", "split"]
    if section == "validation":  # which uses the text_key of training
        names.append("text_key")
    for field in fields(config):
        if field.name in names and getattr(config, field.name) != field.default:
            problem = f"has no effect, since {key} defines the data. Remove one of the two"
            yield f"{section}.{field.name}", problem


def _phases(job_config: JobConfig) -> Problems:
    data = job_config.data
    if data.phases and not data.sources:
        yield "data.phases", "needs data.sources, whose weights the phases change"
    for i, phase in enumerate(data.phases):
        key = f"data.phases.{i}"
        if len(phase.weights) != len(data.sources):
            problem = f"must have one weight per source in data.sources ({len(data.sources)})"
            yield f"{key}.weights", problem
        if not any(phase.weights):
            yield f"{key}.weights", "all weights are 0"
        if i and phase.from_step <= (before := data.phases[i - 1].from_step):
            yield (
                f"{key}.from_step",
                f"must be more than from_step of the previous phase ({before})",
            )


def _optimizer(job_config: JobConfig) -> Problems:
    name = job_config.optimizer.name
    if name not in OPTIMIZERS:
        hint = did_you_mean(name, OPTIMIZERS)
        problem = f"no such optimizer.{hint} Register your own with register_optimizer"
        yield "optimizer.name", problem
    yield from _state_dtype(job_config.optimizer)
    for i, rule in enumerate(job_config.optimizer.rules):
        key = f"optimizer.rules.{i}"
        if not rule.pattern:
            yield key, "needs a pattern"
        yield from _pattern(f"{key}.pattern", rule.pattern)


def _state_dtype(config: Optimizer) -> Problems:
    if config.state_dtype == "float32":
        return
    if config.name == "SGD":
        yield "optimizer.state_dtype", "SGD has 'float32' only. AdamW, Adam and Muon have both"
    for name in _DECAYS.get(config.name, ()):
        if getattr(config, name) > _MOST_DECAY:
            yield (
                f"optimizer.{name}",
                f"must be at most {_MOST_DECAY} with optimizer.state_dtype = "
                "'bfloat16', which rounds smaller changes of the state to nothing. Or use "
                "optimizer.state_dtype = 'float32'",
            )


def _pattern(key: str, pattern: str) -> Problems:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        yield key, f"not a regular expression: {error}"


def _schedule(job_config: JobConfig) -> Problems:
    schedule, steps = job_config.lr_scheduler, job_config.training.steps
    span, decays = schedule.total_steps or steps, schedule.decay_ratio != 0
    if span < steps and decays and not schedule.min_lr_factor:
        yield (
            "lr_scheduler.total_steps",
            f"the learning rate is 0 from this step on, but training.steps = {steps}. Set it to "
            f"{steps} or more, or set lr_scheduler.min_lr_factor",
        )


def _activation_checkpoint(job_config: JobConfig) -> Problems:
    config, parallelism = job_config.activation_checkpoint, job_config.parallelism
    option = config.selective_ac_option
    if option != "op" and not re.fullmatch("[1-9][0-9]{0,8}", option):
        problem = "must be 'op', or a positive integer N for every N-th block"
        yield "activation_checkpoint.selective_ac_option", problem
    if config.mode != "memory_budget":
        return
    if max(parallelism.tensor_parallel_degree, parallelism.context_parallel_degree) > 1:
        yield (
            "activation_checkpoint.mode",
            "the compiler does not support it for blocks that communicate, as with tensor and "
            "context parallelism (torch 2.13). Use 'selective' or 'full'",
        )
    if not job_config.compile.compiles("model"):
        problem = "needs the compiler: set compile.enable, with 'model' in compile.components"
        yield "activation_checkpoint.mode", problem


def _compile_backend(job_config: JobConfig) -> Problems:
    config = job_config.compile
    if not config.enable or config.backend == "inductor":
        return
    known = list_backends(exclude_tags=())
    if config.backend not in known:
        yield "compile.backend", f"no such backend.{did_you_mean(config.backend, known)}"


def _compile_mode(job_config: JobConfig, world_size: int) -> Problems:
    config, key = job_config.compile, "compile.mode"
    if config.mode == "default":
        return
    if not config.compiles("model") or config.backend != "inductor":
        yield (
            key,
            "set compile.enable, 'model' in compile.components and compile.backend = 'inductor', "
            "the only backend with modes",
        )
    if config.mode == "max-autotune-no-cudagraphs":
        return
    if world_size > 1:
        yield (
            key,
            "a CUDA graph reads weights at the addresses they had when it was captured, but "
            "several ranks gather them to new addresses each time. Use 'default' or "
            "'max-autotune-no-cudagraphs'",
        )
    if batch_sizes(job_config, 1).most_passes > 1:
        yield (
            key,
            "CUDA graphs do not support gradient accumulation: the next micro-batch would "
            "overwrite the gradients, which lie in the graph's memory. Use one micro-batch "
            "(training.global_batch_size = training.local_batch_size)",
        )
    if device.device_type() != "cuda":
        yield key, "CUDA graphs need a GPU. Use 'default' or 'max-autotune-no-cudagraphs'"


def _profiling(job_config: JobConfig, world_size: int) -> Problems:
    # With fewer hosts than before, some of the ranks may be missing.
    if (first := min(job_config.profiling.ranks, default=0)) not in range(world_size):
        yield "profiling.ranks", f"no rank {first}: this job has the ranks 0 to {world_size - 1}"
    if job_config.profiling.profiler_active > (freq := job_config.profiling.profile_freq):
        yield "profiling.profiler_active", f"must be at most profiling.profile_freq ({freq})"


def _outputs(job_config: JobConfig) -> Problems:
    checkpoint = job_config.checkpoint
    paths = {"job.dump_folder": job_config.job.dump_folder, "checkpoint.folder": checkpoint.folder}
    for key, path in paths.items():
        if path.startswith("$"):
            problem = "only `~` is expanded, not variables: write the path out"
            yield key, f"{problem} (or ./{path} for a folder of that name)"
    folder = existing = os.path.abspath(job_config.job.dump_folder)
    with begin_errors_with("job.dump_folder"):
        while not exists(Path(existing), ConfigError):
            existing = os.path.dirname(existing)
    if not is_folder(Path(existing), ConfigError):
        yield "job.dump_folder", f"{existing} is a file, not a folder"
    if not os.access(existing, os.W_OK):
        yield "job.dump_folder", f"cannot write {folder}: {existing} is not writable"

    if checkpoint.load_step != -1 and not checkpoint.enable:
        yield "checkpoint.load_step", "has no effect, since checkpoint.enable is false"
    yield from _initial_load(job_config)
    yield from _storage(job_config)
    if checkpoint.last_save_in_hf and not checkpoint.enable:
        yield (
            "checkpoint.last_save_in_hf",
            "nothing would be saved, since checkpoint.enable is false. Set it to false too "
            "(--checkpoint.last_save_in_hf false)",
        )
    metrics, installed = job_config.metrics, importlib.util.find_spec
    if metrics.enable_wandb and installed("wandb") is None:
        yield "metrics.enable_wandb", "wandb is not installed: pip install 'torchtitan[wandb]'"
    if metrics.enable_tensorboard and installed("tensorboard") is None:
        yield "metrics.enable_tensorboard", "tensorboard is not installed: pip install tensorboard"


def _storage(job_config: JobConfig) -> Problems:
    checkpoint = job_config.checkpoint
    for name in ("folder", "initial_load_path"):
        if not is_url(url := getattr(checkpoint, name)):
            continue
        try:
            path = storage_path(url)
        except ConfigError as error:
            raise ConfigError(f"checkpoint.{name} = {error}") from error
        if name == "folder" and checkpoint.last_save_in_hf and isinstance(path, RemotePath):
            yield (
                "checkpoint.last_save_in_hf",
                "can only be written to a local folder, but checkpoint.folder is a URL. Use "
                "`torchtitan convert to-hf` on a local copy of the last checkpoint",
            )


def _initial_load(job_config: JobConfig) -> Problems:
    config = job_config.checkpoint
    yield from _pattern("checkpoint.initial_load_exclude", config.initial_load_exclude)
    in_hf, path = config.initial_load_in_hf, config.initial_load_path
    branches = not config.initial_load_model_only
    if branches and not path:
        yield (
            "checkpoint.initial_load_model_only",
            "there is no checkpoint to branch from: set checkpoint.initial_load_path",
        )
    if branches and config.initial_load_exclude:
        yield (
            "checkpoint.initial_load_exclude",
            "has no effect, since checkpoint.initial_load_model_only is false",
        )
    key = "checkpoint.initial_load_path" if path else "checkpoint.initial_load_in_hf"
    if in_hf and not path:
        path = job_config.model.tokenizer_path
        if path == "bytes":
            yield (
                key,
                "needs a Hugging Face folder: set checkpoint.initial_load_path, or "
                "model.tokenizer_path if the weights are in the tokenizer's folder",
            )
    if not path:
        return
    if is_url(path):
        if in_hf:
            yield key, "Hugging Face weights can only be read from local folders"
        return  # checked when it is opened
    folder = Path(path).expanduser()
    if not is_folder(folder, ConfigError):
        yield key, "no such folder"
    if branches and (in_hf or is_hf_weights(folder)):
        yield (
            "checkpoint.initial_load_model_only",
            "a Hugging Face folder holds only weights. Set true, or branch from a step-N",
        )
    if in_hf and not is_hf_weights(folder):
        names = f"{SAFETENSORS_INDEX} or {SAFETENSORS_FILE}"
        yield key, f"{path} holds no Hugging Face weights ({names})"
