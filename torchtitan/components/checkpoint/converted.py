"""Conversion by a model's state dict adapter, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from torchtitan.errors import CheckpointError

if TYPE_CHECKING:
    from torchtitan.protocols import BaseStateDictAdapter


def convert_sharded(
    convert: Callable[[dict[str, Any]], dict[str, Any]], layer: dict[str, Any]
) -> dict[str, Any]:
    """Call `to_hf` or `from_hf` of an adapter, for the tensors of one layer.

    PyTorch cannot compute some operations on shards, such as `unflatten` of 3 heads on 2 ranks. All
    ranks of a mesh then gather the layer, and keep a part of each result.
    """
    try:
        return convert(layer)
    except RuntimeError:
        if not any(isinstance(tensor, DTensor) for tensor in layer.values()):
            raise
    converted = convert({name: _redistribute(t, Replicate()) for name, t in layer.items()})
    return {name: _redistribute(t, Shard(0)) for name, t in converted.items()}


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
    wanted = set()
    entries: dict[str, Any] = metadata.state_dict_metadata
    for key, entry in entries.items():
        try:
            converted = adapter.from_hf({key: torch.empty(entry.size, device="meta")})
        except (CheckpointError, KeyError):
            wanted.add(key)
            continue
        if not all(map(is_left_out, converted)):
            wanted.add(key)
    return wanted
