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

from torchtitan.components.checkpoint.safetensors_files import (
    SAFETENSORS_FILE,
    SAFETENSORS_INDEX,
    is_hf_weights,
)
from torchtitan.components.checkpoint.storage import RemotePath, storage_path
from torchtitan.components.optimizer import OPTIMIZERS
from torchtitan.config.batch import resolve_batch
from torchtitan.config.data import DataSource
from torchtitan.config.job_config import JobConfig
from torchtitan.config.load import fail
from torchtitan.config.upstream import value_instead
from torchtitan.data.sources import DATASETS
from torchtitan.errors import ConfigError, did_you_mean
from torchtitan.preflight.layout_rules import check_layout
from torchtitan.preflight.survival_rules import check_survival
from torchtitan.runtime import device
from torchtitan.tools.text import is_url

_DATASETS_WITH_PATH = {
    "text": "a file, a glob or a folder",
    "jsonl": "a file, a glob or a folder",
    "parquet": "a file, a glob or a folder",
    "arrow": "a file, a glob or a folder",
    "tokens": "a folder made by `torchtitan data prepare`, or .bin files",
    "hf": "a repository of the Hugging Face hub, or a local copy",
}


def validate(job_config: JobConfig, world_size: int) -> None:
    """Check the rules between sections for a run of `world_size` processes.

    Do custom imports first, as they may register datasets.
    """
    check_layout(job_config, world_size)
    _check_datasets(job_config)
    _check_phases(job_config)
    _check_optimizer(job_config)
    _check_schedule(job_config)
    _check_activation_checkpoint(job_config)
    _check_compile(job_config)
    check_survival(job_config)
    _check_compile_mode(job_config, world_size)
    _check_outputs(job_config)


def _check_datasets(job_config: JobConfig) -> None:
    sections: list[tuple[str, Any, str]] = [("training", job_config.training, "data")]
    if job_config.validation.enable:
        sections.append(("validation", job_config.validation, "validation"))
    for section, config, holder in sections:
        key = f"{holder}.sources"
        sources = getattr(job_config, holder).sources
        if not sources:
            _check_dataset(job_config, section, config)
            continue
        for i, source in enumerate(sources):
            _check_dataset(job_config, f"{key}.{i}", source)
        _check_sources(job_config, key, sources)
        _refuse_dataset_beside_sources(job_config, section, config, key)


def _check_sources(job_config: JobConfig, key: str, sources: list[DataSource]) -> None:
    names = [source.name or source.dataset for source in sources]
    for i, name in enumerate(names):
        if name in names[:i]:
            problem = f"{name!r} is also the name of another source. Give each source its own name"
            fail(job_config, f"{key}.{i}.name", problem)
    if not any(source.weight for source in sources):
        fail(job_config, key, "all weights are 0")


def _check_phases(job_config: JobConfig) -> None:
    data = job_config.data
    if data.phases and not data.sources:
        fail(
            job_config,
            "data.phases",
            "needs data.sources, whose weights the phases change",
        )
    for i, phase in enumerate(data.phases):
        if len(phase.weights) != len(data.sources):
            problem = f"must have one weight per source in data.sources ({len(data.sources)})"
            fail(job_config, f"data.phases.{i}.weights", problem)
        if not any(phase.weights):
            fail(job_config, f"data.phases.{i}.weights", "all weights are 0")
        if i and phase.from_step <= (before := data.phases[i - 1].from_step):
            problem = f"must be more than from_step of the previous phase ({before})"
            fail(job_config, f"data.phases.{i}.from_step", problem)


def _refuse_dataset_beside_sources(
    job_config: JobConfig, section: str, config: Any, key: str
) -> None:
    """Refuse a dataset beside sources."""
    names = ["dataset", "dataset_path", "split"]
    if section == "validation":  # which uses the text_key of training
        names.append("text_key")
    for field in fields(config):
        if field.name in names and getattr(config, field.name) != field.default:
            problem = f"has no effect, since {key} defines the data. Remove one of the two"
            fail(job_config, f"{section}.{field.name}", problem)


def _check_dataset(job_config: JobConfig, section: str, config: Any) -> None:
    if config.dataset not in DATASETS:
        key, name = f"{section}.dataset", config.dataset
        hint = value_instead(key, name, DATASETS) or did_you_mean(name, DATASETS)
        fail(job_config, key, f"no such dataset.{hint}")
    if config.dataset in _DATASETS_WITH_PATH and not config.dataset_path:
        problem = f"needs {section}.dataset_path: {_DATASETS_WITH_PATH[config.dataset]}"
        fail(job_config, f"{section}.dataset", problem)


def _check_optimizer(job_config: JobConfig) -> None:
    name = job_config.optimizer.name
    if name not in OPTIMIZERS:
        problem = f"no such optimizer.{did_you_mean(name, OPTIMIZERS)} Register your own "
        problem += "with register_optimizer"
        fail(job_config, "optimizer.name", problem)
    for i, rule in enumerate(job_config.optimizer.rules):
        key = f"optimizer.rules.{i}"
        if not rule.pattern:
            fail(job_config, key, "needs a pattern")
        _check_pattern(job_config, f"{key}.pattern", rule.pattern)


def _check_pattern(job_config: JobConfig, key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        fail(job_config, key, f"not a regular expression: {error}")


def _check_schedule(job_config: JobConfig) -> None:
    schedule, steps = job_config.lr_scheduler, job_config.training.steps
    span, decays = schedule.total_steps or steps, schedule.decay_ratio != 0
    if span < steps and decays and not schedule.min_lr_factor:
        fail(
            job_config,
            "lr_scheduler.total_steps",
            f"the learning rate is 0 from this step on, but training.steps = {steps}. Set it to "
            f"{steps} or more, or set lr_scheduler.min_lr_factor",
        )


def _check_activation_checkpoint(job_config: JobConfig) -> None:
    config = job_config.activation_checkpoint
    option = config.selective_ac_option
    if option != "op" and not re.fullmatch("[1-9][0-9]{0,8}", option):
        problem = "must be 'op', or a positive integer N for every N-th block"
        fail(job_config, "activation_checkpoint.selective_ac_option", problem)
    compiles_model = job_config.compile.compiles("model")
    parallelism = job_config.parallelism
    shared = max(parallelism.tensor_parallel_degree, parallelism.context_parallel_degree) > 1
    if config.mode == "memory_budget" and shared:
        problem = (
            "the compiler does not support it for blocks that communicate, as with tensor and "
            "context parallelism (torch 2.13). Use 'selective' or 'full'"
        )
        fail(job_config, "activation_checkpoint.mode", problem)
    if config.mode == "memory_budget" and not compiles_model:
        problem = "needs the compiler: set compile.enable, with 'model' in compile.components"
        fail(job_config, "activation_checkpoint.mode", problem)


def _check_compile(job_config: JobConfig) -> None:
    config = job_config.compile
    if not config.enable or config.backend == "inductor":
        return
    known = list_backends(exclude_tags=())
    if config.backend not in known:
        fail(
            job_config, "compile.backend", f"no such backend.{did_you_mean(config.backend, known)}"
        )


def _check_compile_mode(job_config: JobConfig, world_size: int) -> None:
    config, key = job_config.compile, "compile.mode"
    if config.mode == "default":
        return
    if not config.compiles("model") or config.backend != "inductor":
        problem = "set compile.enable, 'model' in compile.components and compile.backend = "
        fail(job_config, key, f"{problem}'inductor', the only backend with modes")
    if config.mode == "max-autotune-no-cudagraphs":
        return
    if world_size > 1:
        problem = (
            "a CUDA graph reads weights at the addresses they had when it was captured, but "
            "several ranks gather them to new addresses each time. Use 'default' or "
            "'max-autotune-no-cudagraphs'"
        )
        fail(job_config, key, problem)
    if resolve_batch(job_config, 1)[1] > 1:
        problem = (
            "CUDA graphs do not support gradient accumulation: the next micro-batch would "
            "overwrite the gradients, which lie in the graph's memory. Use one micro-batch "
            "(training.global_batch_size = training.local_batch_size)"
        )
        fail(job_config, key, problem)
    if device.device_type() != "cuda":
        problem = "CUDA graphs need a GPU. Use 'default' or 'max-autotune-no-cudagraphs'"
        fail(job_config, key, problem)


def _check_outputs(job_config: JobConfig) -> None:
    for key, path in {
        "job.dump_folder": job_config.job.dump_folder,
        "checkpoint.folder": job_config.checkpoint.folder,
    }.items():
        if path.startswith("$"):
            problem = "only `~` is expanded, not variables: write the path out"
            fail(job_config, key, f"{problem} (or ./{path} for a folder of that name)")
    folder = existing = os.path.abspath(job_config.job.dump_folder)
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        fail(job_config, "job.dump_folder", f"{existing} is a file, not a folder")
    if not os.access(existing, os.W_OK):
        fail(job_config, "job.dump_folder", f"cannot write {folder}: no permission in {existing}")

    checkpoint = job_config.checkpoint
    if checkpoint.load_step != -1 and not checkpoint.enable:
        problem = "has no effect, since checkpoint.enable is false"
        fail(job_config, "checkpoint.load_step", problem)
    _check_initial_load(job_config)
    _check_storage(job_config)
    if checkpoint.last_save_in_hf and not checkpoint.enable:
        problem = "nothing would be saved, since checkpoint.enable is false. Set it to false too "
        problem += "(--checkpoint.last_save_in_hf false)"
        fail(job_config, "checkpoint.last_save_in_hf", problem)
    if job_config.metrics.enable_wandb and importlib.util.find_spec("wandb") is None:
        problem = "wandb is not installed: pip install 'torchtitan[wandb]'"
        fail(job_config, "metrics.enable_wandb", problem)


def _check_storage(job_config: JobConfig) -> None:
    checkpoint = job_config.checkpoint
    for key in ("folder", "initial_load_path"):
        if is_url(getattr(checkpoint, key)):
            try:
                path = storage_path(getattr(checkpoint, key))
            except ConfigError as error:
                raise ConfigError(f"checkpoint.{key} = {error}") from error
            if key == "folder" and checkpoint.last_save_in_hf and isinstance(path, RemotePath):
                problem = (
                    "can only be written to a local folder, but checkpoint.folder is a URL. Use "
                )
                problem += "`torchtitan convert to-hf` on a local copy of the last checkpoint"
                fail(job_config, "checkpoint.last_save_in_hf", problem)


def _check_initial_load(job_config: JobConfig) -> None:
    exclude = job_config.checkpoint.initial_load_exclude
    _check_pattern(job_config, "checkpoint.initial_load_exclude", exclude)
    in_hf, path = job_config.checkpoint.initial_load_in_hf, job_config.checkpoint.initial_load_path
    key = "checkpoint.initial_load_path" if path else "checkpoint.initial_load_in_hf"
    if in_hf and not path:
        path = job_config.model.tokenizer_path
        if path == "bytes":
            problem = (
                "needs a Hugging Face folder: set checkpoint.initial_load_path, or "
                "model.tokenizer_path if the weights are in the tokenizer's folder"
            )
            fail(job_config, key, problem)
    if not path:
        return
    if is_url(path):
        if in_hf:
            fail(job_config, key, "Hugging Face weights can only be read from local folders")
        return  # checked when it is opened
    folder = os.path.expanduser(path)
    if not os.path.isdir(folder):
        fail(job_config, key, "no such folder")
    if in_hf and not is_hf_weights(Path(folder)):
        names = f"{SAFETENSORS_INDEX} or {SAFETENSORS_FILE}"
        problem = f"{path} holds no Hugging Face weights ({names})"
        fail(job_config, key, problem)
