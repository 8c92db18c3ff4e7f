"""Converts a Hugging Face folder to a checkpoint of ours, tensor by tensor."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import Metadata

from torchtitan.components.checkpoint.converted import (
    by_layer,
    check_copies,
    require_converted,
    wanted_keys,
)
from torchtitan.components.checkpoint.manifest import Manifest
from torchtitan.components.checkpoint.model_tensors import (
    buffer_names,
    dtype_of_copy,
    first_names,
    model_state,
)
from torchtitan.components.checkpoint.reader import (
    check_keys_and_shapes,
    check_no_more,
    read_safetensors_metadata,
)
from torchtitan.components.checkpoint.saved_tensors import SavedTensor, save_hole
from torchtitan.errors import begin_errors_with
from torchtitan.models.from_hf import max_seq_len_of_hf_folder
from torchtitan.models.which_model import KnownModel
from torchtitan.protocols import BaseStateDictAdapter
from torchtitan.protocols.changed_args import plain_args

from .output import new_folder, save_one_by_one
from .parts import contiguous_parts, copy_elements


def convert_from_hf(
    folder: Path, out: Path, known: KnownModel, dtype: torch.dtype | None
) -> Manifest:
    """Write the weights in `folder` as the model-only checkpoint `out`, of step 0.

    Tensors that the files have no place for belong to training, such as a router's load, and begin
    at 0.

    Args:
        dtype: of floating-point tensors, with the exceptions of `dtype_of_copy`; None: as in the
            files.
    """
    adapter = known.adapter(folder)
    metadata = read_safetensors_metadata(folder)
    entries: dict[str, Any] = metadata.state_dict_metadata
    with begin_errors_with(str(folder)):
        adapter.check_names(entries)
    model = known.build()
    check_copies(folder, metadata, adapter, [model])
    state, tied = model_state([model]), first_names(model)
    hf_state = adapter.to_hf({name: t for name, t in state.items() if name not in tied})
    wanted = wanted_keys(adapter, metadata, tied.__contains__)
    check_keys_and_shapes(folder, metadata, hf_state)
    check_no_more(folder, metadata, hf_state, wanted.__contains__)

    planned, buffers = {}, buffer_names([model])
    for layer in by_layer({n: t for n, t in state.items() if n not in tied}).values():
        hf_layer = adapter.to_hf(layer)
        read = {key: _meta(entries[key].size, entries[key].properties.dtype) for key in hf_layer}
        converted = adapter.from_hf(read)
        for name, tensor in layer.items():
            require_converted(name, tensor, converted, buffers)
            own = converted.get(name, tensor).dtype
            target = _meta(tensor.shape, dtype_of_copy(own, dtype, name in buffers))
            parts = contiguous_parts(name, hf_layer, layer)
            planned[name] = _Planned(target, name, list(read) if name in converted else [], parts)
    planned = {name: planned[tied.get(name, name)] for name in state}
    manifest = Manifest(
        step=0,
        model_only=True,
        model={
            "name": known.name,
            "flavor": known.flavor,
            "args": plain_args(known.args),
            "tokenizer": str(folder.absolute()),
            "seq_len": max_seq_len_of_hf_folder(folder) or 0,
        },
    )
    copier = _Copier(adapter, folder, metadata)
    with new_folder(out) as partial:
        targets = {name: tensor.target for name, tensor in planned.items()}
        save_one_by_one(
            partial, manifest, targets, lambda name, to: copier.write(planned[name], to)
        )
    return manifest


def _meta(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class _Planned(NamedTuple):
    """A tensor of the checkpoint to write."""

    target: torch.Tensor
    """On the meta device, in its final dtype."""
    own_name: str
    """The first of its names in the model, which is the name that the adapter knows."""
    keys: list[str]
    """Keys of its layer's tensors in the files; none: it begins at 0."""
    parts: dict[str, int] | None
    """See `contiguous_parts`."""


@dataclass
class _Copier:
    """Makes a checkpoint's tensors from those of Hugging Face."""

    adapter: BaseStateDictAdapter
    folder: Path
    metadata: Metadata
    layer: tuple[list[str], dict[str, torch.Tensor]] = ([], {})
    """Keys of the layer that was converted last, and its tensors."""

    def write(self, planned: _Planned, file: BinaryIO) -> None:
        """Append a tensor to `file`."""
        if not planned.keys:
            torch.save(torch.zeros_like(planned.target, device="cpu"), file)
        elif planned.parts:
            self._write_parts(planned.target, planned.parts, file)
        else:
            if self.layer[0] != planned.keys:
                self.layer = [], {}
                read = {key: self._source(key).whole() for key in planned.keys}
                self.layer = planned.keys, self.adapter.from_hf(read)
            whole = self.layer[1][planned.own_name].to(planned.target.dtype)
            whole = whole.clone(memory_format=torch.contiguous_format)  # of a view: only its part
            torch.save(whole, file)

    def _write_parts(self, target: torch.Tensor, parts: dict[str, int], file: BinaryIO) -> None:
        """Append a tensor in pieces. Args: parts: key of each part -> index of first element."""
        data = save_hole(file, target.shape, target.dtype)
        for key, first in parts.items():
            source, at = self._source(key), data + first * target.itemsize
            copy_elements(source, 0, source.shape.numel(), file, at, target.dtype)
        file.seek(0, os.SEEK_END)

    def _source(self, key: str) -> SavedTensor:
        return SavedTensor.in_safetensors(self.folder, self.metadata, key)
