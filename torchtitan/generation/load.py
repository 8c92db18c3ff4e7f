"""Loads a trained model and its tokenizer from a checkpoint folder, ready to run.

Two kinds of folders identify their model: a checkpoint of ours by its manifest and the
`config.resolved.toml` of its run, a Hugging Face folder by its `config.json`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan.cli import end_at_once
from torchtitan.components.checkpoint.folder import list_checkpoints
from torchtitan.components.checkpoint.load import load_model_weights
from torchtitan.components.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    is_hf_weights,
    no_checkpoint,
)
from torchtitan.components.checkpoint.model_identity import warn_of_other_tokenizer
from torchtitan.components.checkpoint.storage import local_path
from torchtitan.components.checkpoint.tokenizer_files import end_of_turn
from torchtitan.components.model_inputs import needed_inputs
from torchtitan.components.run_folder import CONFIG_FILE
from torchtitan.components.tokenizer import Tokenizer, path_of
from torchtitan.config import JobConfig, load_config
from torchtitan.config.options import shown_as
from torchtitan.config.parallelism import Parallelism
from torchtitan.distributed.init import set_weights
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.tying import allocate
from torchtitan.distributed.whole_weights import is_random, storage_key, target_of
from torchtitan.errors import CheckpointError, ConfigError
from torchtitan.models.from_hf import CONFIG, max_seq_len_of_hf_folder
from torchtitan.models.plugins import load_plugins
from torchtitan.models.which_model import model_of_checkpoint, model_of_hf_folder, model_of_options
from torchtitan.preflight.model_fit import require_vocabulary
from torchtitan.protocols.model import ModelProtocol
from torchtitan.protocols.model_converter import convert_to_load
from torchtitan.protocols.train_spec import TrainSpec
from torchtitan.runtime.device import check_devices, device, device_type
from torchtitan.runtime.process_group import init_distributed
from torchtitan.runtime.world import world_size
from torchtitan.tools.foreign_files import is_file, is_folder, read_json
from torchtitan.tools.text import few

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass
class ModelOptions:
    """Which model, and how it is run."""

    checkpoint: Annotated[str, shown_as("PATH")]
    """Torchtitan checkpoint (a step-N folder, or a run's folder for its newest), or a Hugging Face
    folder."""
    model: Annotated[str | None, shown_as("NAME")] = None
    """Model name in the registry, if the folder does not record it, or to override a run's."""
    flavor: Annotated[str | None, shown_as("FLAVOR")] = None
    """Flavor of the model given by --model."""
    custom_import: Annotated[str, shown_as("MODULE")] = ""
    """Python module to import first, so that it can register a model."""
    tokenizer: Annotated[str | None, shown_as("bytes|FOLDER")] = None
    """`bytes`, or a folder with a tokenizer.json. Default: the run's or checkpoint's tokenizer"""
    dtype: DTypeName = "auto"
    """Dtype of the weights and the computation. `auto`: bfloat16 on CUDA, float32 on a CPU."""
    tensor_parallel_degree: int = 1
    """Number of torchrun ranks that each layer's matrices are sharded over."""


@dataclass
class CheckpointSource:
    """The contents of a checkpoint folder, as far as known without reading weights."""

    folder: Path
    model_name: str
    spec: TrainSpec
    job_config: JobConfig
    """The config of the run, or the defaults, with the model and layout of the options."""
    tokenizer: Tokenizer
    manifest: Manifest | None
    """None: a Hugging Face folder."""
    of_run: bool
    """Whether a run saved it, whose config is known."""
    stop_tokens: frozenset[int] = field(default_factory=frozenset)
    """Tokens that end a text."""
    max_seq_len: int | None = None
    """Longest sequence that the model is made for; None: no limit is known."""

    @property
    def add_bos(self) -> bool:
        """Whether a text begins with bos.

        As in the documents of the run, or, for weights from elsewhere, as their tokenizer
        specifies.
        """
        if self.of_run:
            return self.job_config.data.add_bos and self.tokenizer.bos_id is not None
        return getattr(self.tokenizer, "adds_bos", False)


@dataclass
class LoadedModel:
    """A model with its weights."""

    source: CheckpointSource
    model: nn.Module
    parallel_dims: ParallelDims

    @property
    def tp_group(self) -> dist.ProcessGroup | None:
        dims = self.parallel_dims
        return dims.world_mesh["tp"].get_group() if dims.tp_enabled else None


def open_source(options: ModelOptions) -> CheckpointSource:
    """Determine the folder's contents, and check that model, tokenizer and layout fit together."""
    load_plugins(options.custom_import)
    folder = _checkpoint_folder(options.checkpoint)
    manifest = Manifest.read(folder) if is_file(folder / MANIFEST, CheckpointError) else None
    saved_config = None if manifest is None else _config_of_run(folder, manifest.is_converted)
    told = model_of_options(options.model, options.flavor)
    known = (model_of_checkpoint if manifest else model_of_hf_folder)(folder, told)
    name, spec = known.name, known.spec
    if spec.model_cls.sees_later_tokens:
        raise ConfigError(
            f"{name} is not a causal model ({spec.model_cls.__name__}.sees_later_tokens): generate "
            "and eval need logits of the next token"
        )
    job_config = saved_config or JobConfig()
    job_config.model.name, job_config.model.flavor = name, known.flavor
    job_config.model.args = {}  # the spec has the checkpoint's
    # An absolute path, while that of a run's config need not be.
    recorded = manifest.model.get("tokenizer") if manifest else None
    if options.tokenizer is not None:
        job_config.model.tokenizer_path = options.tokenizer
    elif saved_config is None:  # of Hugging Face, or from `torchtitan convert`
        job_config.model.tokenizer_path = recorded or _own_tokenizer(folder)
    elif recorded and is_file(Path(recorded, "tokenizer.json"), ConfigError):
        job_config.model.tokenizer_path = recorded
    _set_layout(job_config, options, spec)
    parameters = inspect.signature(spec.model_cls.forward).parameters.values()
    if needed := needed_inputs(list(parameters)[2:]):
        raise ConfigError(
            f"{name}: {spec.model_cls.__name__}.forward needs {few(needed)}, which generate and "
            "eval do not have: they need a default value"
        )
    if spec.build_tokenizer_fn is None:
        raise ConfigError(f"{name} has no tokenizer (build_tokenizer_fn) in its TrainSpec")
    args: Any = spec.updated_args(job_config)
    if getattr(args, "long_rotations", False):  # for the sequences of training
        args = replace(args, long_rotations=False)
    spec = replace(spec, model_args=args)
    tokenizer, of_run = spec.tokenizer(job_config), saved_config is not None
    source = CheckpointSource(folder, name, spec, job_config, tokenizer, manifest, of_run)
    if manifest:
        warn_of_other_tokenizer(folder, manifest.model, tokenizer)
    require_vocabulary(tokenizer, spec.model_args, f"{name} of {folder}")
    source.stop_tokens = _stop_tokens(source)
    source.max_seq_len = _max_seq_len(source)
    return source


def load_model(source: CheckpointSource) -> LoadedModel:
    """Build the model, spread it over the ranks, and read its weights.

    With more than one rank, they must have joined a process group.
    """
    config, spec = source.job_config, source.spec
    dims = ParallelDims.from_config(config.parallelism, world_size())
    dtype = getattr(torch, config.training.mixed_precision_param)
    model = spec.meta_model()
    convert_to_load(model, config, dims)
    for param in model.parameters():  # not buffers: routers keep their state in float32
        param.data = param.data.to(dtype)
    if dims.world_size > 1:
        model = spec.parallelize(model, dims.world_mesh, dims, config)
    _allocate(model, device())
    load_model_weights(model, source.folder)
    return LoadedModel(source, model.eval(), dims)


def _checkpoint_folder(location: str) -> Path:
    """Return the checkpoint at a location: the folder itself, or the newest one of a run."""
    path = local_path(location)
    if not is_folder(path, CheckpointError):
        raise CheckpointError(f"--checkpoint {path}: no such folder")
    if is_file(path / MANIFEST, CheckpointError) or is_hf_weights(path):
        return path
    for folder in (path, path / "checkpoint"):
        steps = list_checkpoints(folder)
        complete = [step for step in steps if is_file(step / MANIFEST, CheckpointError)]
        if complete:
            return complete[-1]
    if is_file(path / CONFIG_FILE, CheckpointError):  # a run's folder
        raise CheckpointError(
            f"--checkpoint {path}: the run saved no checkpoint there. Train with "
            "--checkpoint.enable, or give the run's checkpoint.folder"
        )
    raise no_checkpoint(path)


def _config_of_run(folder: Path, is_converted: bool) -> JobConfig | None:
    """Return the config of the run that saved a checkpoint, found in it or beside it; else None.

    If a converted checkpoint lies in a run's folder, that run did not make its weights.
    """
    for parent in (folder,) if is_converted else (folder, *folder.parents[:2]):
        path = parent / CONFIG_FILE
        if is_file(path, CheckpointError):
            config = load_config(["--job.config_file", str(path)])
            load_plugins(config.job.custom_import)
            return config
    return None


def _own_tokenizer(folder: Path) -> str:
    if is_file(folder / "tokenizer.json", ConfigError):
        return str(folder)
    raise ConfigError(
        f"{folder} has no tokenizer.json. Give --tokenizer FOLDER, or --tokenizer bytes for a "
        "byte-level model"
    )


def _set_layout(config: JobConfig, options: ModelOptions, spec: TrainSpec) -> None:
    """Reset the settings of training, and parallelize the model according to the options."""
    degree = options.tensor_parallel_degree
    if degree < 1 or world_size() % degree:
        raise ConfigError(
            f"--tensor-parallel-degree {degree} must divide the number of processes, "
            f"{world_size()}; start them with torchrun --nproc-per-node N"
        )
    experts = spec.model_args.num_experts
    config.parallelism = Parallelism(
        tensor_parallel_degree=degree,
        expert_parallel_degree=degree if experts and experts % degree == 0 else 1,
        disable_sequence_parallel=True,  # a single token cannot be divided
        disable_loss_parallel=True,
    )
    dtype = options.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device_type() == "cuda" else "float32"
    # Training does not allow float16, inference does.
    cast(Any, config.training).mixed_precision_param = dtype
    config.training.enable_cpu_offload = False
    config.activation_checkpoint.mode = "none"
    config.compile.enable = False
    config.loss.name = "cross_entropy"
    config.loss.z_loss_weight = 0.0


def _stop_tokens(source: CheckpointSource) -> frozenset[int]:
    """Return the tokenizer's eos, the end tokens in its folder and in that of the weights, and the
    token that ended a turn in the run's conversations.
    """
    config = source.job_config
    folders = [path_of(source.tokenizer)]
    if source.manifest is None:
        folders.append(str(source.folder))
    elif source.manifest.is_converted:
        folders.append(source.manifest.model.get("tokenizer", ""))
    tokens = {source.tokenizer.eos_id}
    for folder in folders:
        if folder not in ("", "bytes"):
            tokens.update(_told_ends(Path(folder).expanduser()))
    manifest = source.manifest if source.of_run and folders[0] else None
    if manifest and manifest.data.get("has_conversations"):
        turn = end_of_turn(Path(folders[0]).expanduser(), config.data.chat_template)
        tokens |= set() if turn is None else {turn}
    return frozenset(tokens)


def _told_ends(folder: Path) -> list[int]:
    """Return the end tokens in `generation_config.json`, or without it in `config.json`."""
    for path in (folder / "generation_config.json", folder / CONFIG):
        if not is_file(path, CheckpointError):
            continue
        told = read_json(path, CheckpointError).get("eos_token_id")
        ends = told if isinstance(told, list) else [] if told is None else [told]
        if not all(type(token) is int for token in ends):
            raise CheckpointError(
                f"{path}: eos_token_id = {told!r}: must be a token id, or a list of token ids"
            )
        return ends
    return []


def _max_seq_len(source: CheckpointSource) -> int | None:
    limit = getattr(source.spec.model_args, "max_seq_len", None)
    if limit is not None:
        return limit
    if source.manifest is None:
        return max_seq_len_of_hf_folder(source.folder)
    if source.manifest.is_converted:  # a run's sequences may be shorter than the limit
        return source.manifest.model.get("seq_len") or None
    return None


def _allocate(model: ModelProtocol, device: torch.device) -> None:
    """Allocate a model that is on the meta device, and set tensors that no checkpoint holds.

    The weights are read afterwards, so random initialization, which takes longer, is skipped.
    """
    allocate(model, device)
    with torch.no_grad(), _NoRandomDraws(model):
        set_weights(model)


class _NoRandomDraws(TorchDispatchMode):
    """Skips random operations on what a checkpoint holds, and all changes of sharded parameters,
    since DTensor refuses some.
    """

    def __init__(self, model: ModelProtocol) -> None:
        super().__init__()
        self._saved = {storage_key(tensor) for tensor in model.state_dict().values()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = target_of(func, args, kwargs)
        if target is not None and func._schema.is_mutable:
            draws, sharded = is_random(func), isinstance(target, DTensor)
            if (sharded and not draws) or (draws and storage_key(target) in self._saved):
                return target
        return func(*args, **kwargs)


@contextmanager
def process_group() -> Iterator[None]:
    """Join torchrun's ranks in a process group, within the context; no-op for a single process.

    An error ends a rank at once, see `end_at_once`: leaving the group might never end.
    """
    if world_size() == 1:
        check_devices()
        yield
        return
    init_distributed(timeout_seconds=600)
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        end_at_once(error)
    dist.destroy_process_group()
