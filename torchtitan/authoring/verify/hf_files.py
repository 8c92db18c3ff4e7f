"""Checks the model against a Hugging Face checkpoint's files (`--hf`): config, names, sizes."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from torchtitan.authoring.new.hugging_face import ARGS
from torchtitan.components.checkpoint.model_tensors import first_names
from torchtitan.components.checkpoint.reader import read_safetensors_metadata
from torchtitan.errors import CheckpointError, TitanError
from torchtitan.models.from_hf import args_of_hf_config, read_hf_config
from torchtitan.protocols import BaseModelArgs, BaseStateDictAdapter
from torchtitan.protocols.changed_args import plain_args
from torchtitan.protocols.model import ModelProtocol
from torchtitan.tools.differences import nested_differences
from torchtitan.tools.text import few

from .adapter import adapter_of
from .check import CheckFailedError, Checks, NotApplicableError
from .subject import Subject

CHECKS = Checks()

_NOT_IN_CONFIG = {"attention", "aux_loss_per_sequence", "aux_loss_weight", "z_loss_weight"}
"""Fields of args, or of nested args, that only affect training."""


def unlike_config(args: BaseModelArgs, config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the usual fields of args with another value than in `config.json`, and their keys.

    For args without `from_hf_config`.
    """
    for name, (key, *_) in ARGS.items():
        ours, theirs = getattr(args, name, None), config.get(key)
        if ours is not None and theirs is not None and ours != theirs:
            yield name, key


def folder_of(subject: Subject) -> Path:
    """Return the checkpoint's folder. Raises `NotApplicableError` without `--hf`."""
    if subject.hf_path is None:
        raise NotApplicableError("give --hf PATH to compare with a Hugging Face checkpoint")
    return subject.hf_path


def read_config(subject: Subject) -> dict[str, Any]:
    """Read the config, or the config of the text part if a model has several parts."""
    try:
        config = read_hf_config(folder_of(subject))
    except CheckpointError as error:
        raise CheckFailedError(str(error)) from error
    return config.get("text_config", config)


def args_of(subject: Subject) -> BaseModelArgs:
    """Return the args from `config.json`, or else the flavor's."""
    cls = type(subject.spec.model_args)
    if not hasattr(cls, "from_hf_config"):
        return subject.args
    return args_of_hf_config(cls, read_config(subject))


@CHECKS.of("adapter.hf_config", "the flavor is the checkpoint's model")
def config_matches(subject: Subject) -> str:
    config, ours = read_config(subject), subject.args
    if hasattr(type(ours), "from_hf_config"):
        try:
            theirs = args_of(subject)
        except TitanError as error:
            raise CheckFailedError(
                f"{type(ours).__name__}.from_hf_config rejects it: {error}",
                "It has another architecture, or an option that the model does not support.",
            ) from error
        found = nested_differences(plain_args(ours), plain_args(theirs), _NOT_IN_CONFIG)
        differences = [f"{name} = {a!r} (config.json: {b!r})" for name, a, b in found]
    else:
        differences = [
            f"{name} = {getattr(ours, name)!r} (config.json: {key} = {config[key]!r})"
            for name, key in unlike_config(ours, config)
        ]
    if differences:
        raise CheckFailedError(
            f"flavor {subject.flavor} is not the model of {folder_of(subject)}: "
            f"{few(differences, 5)}",
            "__init__.py: correct the flavor's arguments, or choose the checkpoint's flavor with "
            "--flavor.",
        )
    return f"model_type {config.get('model_type')}"


@CHECKS.of("adapter.hf_names", "the adapter's names and shapes are the files'")
def names_match(subject: Subject) -> str:
    entries: dict[str, Any] = read_safetensors_metadata(folder_of(subject)).state_dict_metadata
    files = {name: list(entry.size) for name, entry in entries.items()}
    model, adapter = model_of_files(subject), adapter_of_files(subject)
    tied = first_names(model)
    state = {name: t for name, t in model.state_dict().items() if name not in tied}
    ours = {name: list(tensor.shape) for name, tensor in adapter.to_hf(state).items()}
    buffers = adapter.to_hf({n: t for n, t in model.named_buffers() if n in state})
    if missing := [name for name in ours if name not in files and name not in buffers]:
        raise CheckFailedError(
            f"to_hf() gives {few(missing, 5)}, which the files do not have; they have "
            f"{few(get_close_matches(missing[0], files, cutoff=0.0))}",
            "state_dict_adapter.py: the names of model.safetensors.index.json.",
        )
    for name, shape in ours.items():
        if name in files and files[name] != shape:
            turned = " (it is transposed)" if files[name] == shape[::-1] else ""
            raise CheckFailedError(
                f"to_hf() gives {name} as {shape}, but in the files it is {files[name]}{turned}",
                "state_dict_adapter.py, or the args.",
            )
    left = [name for name in files if name not in ours and not _is_passed_over(adapter, name)]
    if left:
        raise CheckFailedError(
            f"the files have {few(left, 5)}, which the model does not have",
            "A bias or norm may be missing in the model. If the model really does not need a "
            "tensor, from_hf() must drop it without an error.",
        )
    return f"{len(ours)} tensors"


def _is_passed_over(adapter: Any, name: str) -> bool:
    """Whether `from_hf` drops a tensor."""
    try:
        return not adapter.from_hf({name: torch.empty(0, device="meta")})
    except Exception:
        return False


def model_of_files(subject: Subject) -> ModelProtocol:
    """Build the model with the sizes in `config.json`, without memory."""
    return subject.spec.meta_model(args_of(subject))


def adapter_of_files(subject: Subject) -> BaseStateDictAdapter:
    """Create the adapter for these files. Raises `NotApplicableError` if the model has none."""
    return type(adapter_of(subject))(args_of(subject), hf_assets_path=folder_of(subject))
