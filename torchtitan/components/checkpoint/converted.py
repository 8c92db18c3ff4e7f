"""Conversion by a model's state dict adapter, layer by layer, and what files must hold for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn as nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from torchtitan.distributed.stage_copies import with_absent_modules
from torchtitan.errors import CheckpointError
from torchtitan.protocols.train_spec import some_specs

from .model_tensors import first_names
from .reader import files_of
from .safetensors_files import SafetensorsFile

if TYPE_CHECKING:
    from torchtitan.protocols import BaseStateDictAdapter


def adapter_of(model: nn.Module, path: Path) -> BaseStateDictAdapter:
    """Return the model's adapter for the folder `path`: that of the `TrainSpec` which built it.

    Without one, an adapter of a registered `TrainSpec` of the model's class. If there are several,
    prefer the most derived class, then the model's own type of args, then the one registered last,
    since users register after us.

    Raises:
        CheckpointError: there is no adapter.
    """
    model = cast(nn.Module, getattr(model, "_orig_mod", model))  # within torch.compile's wrapper
    if (own := getattr(model, "_state_dict_adapter", None)) is not None:
        return cast(Any, own)(model.args, hf_assets_path=path)
    found: list[tuple[int, bool, int, type[BaseStateDictAdapter]]] = []
    specs, broken = some_specs()
    for order, spec in enumerate(specs.values()):
        if isinstance(model, spec.model_cls) and spec.state_dict_adapter is not None:
            same_args = isinstance(cast(Any, model.args), type(spec.model_args))
            depth = len(spec.model_cls.__mro__)
            found.append((depth, same_args, order, spec.state_dict_adapter))
    if found:
        *_, adapter = max(found, key=lambda entry: entry[:3])
        return adapter(cast(Any, model.args), hf_assets_path=path)
    raise CheckpointError(
        f"{path} holds Hugging Face weights, but no registered TrainSpec of "
        f"{type(model).__name__} has a state_dict_adapter to read them"
        + "".join(f". And {problem}" for problem in broken)
    )


def convert_sharded(
    convert: Callable[[dict[str, Any]], dict[str, Any]], layer: dict[str, Any]
) -> dict[str, Any]:
    """Call `to_hf` or `from_hf` of an adapter, for the tensors of one layer.

    PyTorch cannot compute some operations on shards, such as `unflatten` of 3 heads on 2 ranks. All
    ranks of a mesh then gather the layer, and keep a part of each result. So do they with a result
    that PyTorch made whole on each rank, as `torch.cat` along the sharded dimension: else each rank
    would hold those of all layers at once.
    """
    sharded = [tensor for tensor in layer.values() if isinstance(tensor, DTensor)]
    try:
        return {name: _sharded_like(sharded, t) for name, t in convert(layer).items()}
    except RuntimeError as error:
        # A lack of memory may be this rank's alone, and the others would not gather the layer.
        if isinstance(error, torch.OutOfMemoryError) or not sharded:
            raise
    converted = convert({name: _redistribute(t, Replicate()) for name, t in layer.items()})
    return {name: _redistribute(t, Shard(0)) for name, t in converted.items()}


def _sharded_like(inputs: list[DTensor], result: Any) -> Any:
    """Shard a result along the mesh dimensions along which it is whole, and an input is not."""
    if not isinstance(result, DTensor) or not result.ndim or any(result is t for t in inputs):
        return result
    placements: list[Placement] = list(result.placements)
    for tensor in inputs:
        if tensor.device_mesh == result.device_mesh:
            for dim, (of_input, own) in enumerate(zip(tensor.placements, placements, strict=True)):
                if own.is_replicate() and not of_input.is_replicate():
                    placements[dim] = Shard(0)
    return result.redistribute(placements=placements)


def _redistribute(tensor: Any, placement: Placement) -> Any:
    if not isinstance(tensor, DTensor) or not tensor.ndim:
        return tensor
    return tensor.redistribute(placements=[placement] * tensor.device_mesh.ndim)


def require_converted(
    name: str, tensor: torch.Tensor, converted: dict[str, Any], buffers: set[str]
) -> None:
    """Require what an adapter makes of a file for `tensor`. Files may lack buffers of training.

    Raises:
        CheckpointError: it makes nothing, or another shape.
    """
    if name not in converted and name in buffers:
        return
    shape = list(converted[name].shape) if name in converted else "nothing"
    if shape != list(tensor.shape):
        raise CheckpointError(
            f"the model's state_dict_adapter gives {shape} for {name}, not {list(tensor.shape)}: "
            "from_hf(to_hf(...)) must have every parameter, in its shape"
        )


def by_layer(state: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Group tensors by layer, and the others by top-level module."""
    groups: dict[str, dict[str, Any]] = {}
    for name, tensor in state.items():
        words = name.split(".")
        group = ".".join(words[:2]) if words[0] == "layers" else words[0]
        groups.setdefault(group, {})[name] = tensor
    return groups


def wanted_keys(
    adapter: BaseStateDictAdapter, metadata: Metadata, is_left_out: Callable[[str], bool]
) -> set[str]:
    """Return the tensors of a Hugging Face folder that the model must have.

    Adapters skip optional tensors: rotary frequencies and copies of tied weights.
    """
    wanted, joined = set(), {}
    entries: dict[str, Any] = metadata.state_dict_metadata
    for key, entry in entries.items():
        tensor = torch.empty(entry.size, device="meta")
        try:
            converted = adapter.from_hf({key: tensor})
        except (CheckpointError, KeyError):
            joined[key] = tensor
            continue
        if not all(map(is_left_out, converted)):
            wanted.add(key)
    try:  # together, as the matrices of all experts are one tensor of ours
        ours = adapter.from_hf(joined)
        left_out = [adapter.to_hf({n: t}) for n, t in ours.items() if is_left_out(n)]
    except (CheckpointError, KeyError, RuntimeError):  # some are missing or unknown
        left_out = []
    return wanted | (joined.keys() - set().union(*left_out))


def check_copies(
    path: Path,
    metadata: Metadata,
    adapter: BaseStateDictAdapter,
    model_parts: list[nn.Module],
) -> None:
    """Raise `CheckpointError` if a tensor that is skipped is no copy of the one that is read."""
    files, told = files_of(metadata), adapter.copies()
    for copy, first in (told | _copies_of_shared(adapter, model_parts)).items():
        if copy == first or not {copy, first} <= files.keys():
            continue
        with SafetensorsFile(path / files[copy]) as a, SafetensorsFile(path / files[first]) as b:
            spec = a.specs[copy]
            same = spec.shape == b.specs[first].shape and all(
                torch.equal(a.read(copy, *rows).float(), b.read(first, *rows).float())
                for rows in spec.pieces()
            )
        if not same:
            message = f"{path}: {copy} differs from {first}, but the model has one tensor for both"
            if copy in told and getattr(adapter.model_args, "tie_word_embeddings", False):
                message += (
                    f" (tie_word_embeddings = true). If {copy} was trained separately, set "
                    "tie_word_embeddings = false in config.json and in the model's args; "
                    "otherwise remove it from the file"
                )
            raise CheckpointError(message)


def _copies_of_shared(
    adapter: BaseStateDictAdapter, model_parts: list[nn.Module]
) -> dict[str, str]:
    """Map the files' names of shared parameters to the name of the one that is read."""
    copies: dict[str, str] = {}
    for part in model_parts:
        for second, first in first_names(part).items():
            with with_absent_modules(part):
                shape = part.get_parameter(first).shape
            keys = (
                adapter.to_hf({name: torch.empty(shape, device="meta")}) for name in (second, first)
            )
            copies |= dict(zip(*keys, strict=True))
    return copies
