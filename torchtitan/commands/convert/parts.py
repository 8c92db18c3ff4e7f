"""Maps tensors of ours to those of Hugging Face, and copies their elements from file to file."""

from __future__ import annotations

import os
import sys
from functools import partial
from io import FileIO
from typing import Any, BinaryIO

import torch

from torchtitan.components.checkpoint.retry import parse_again
from torchtitan.components.checkpoint.saved_tensors import SavedTensor, write_all
from torchtitan.errors import CheckpointError

PIECE_BYTES = 4 * 2**20
"""Small enough to stay in the processor's cache between reading and writing."""


def contiguous_parts(
    name: str, converted: dict[str, Any], layer: dict[str, torch.Tensor]
) -> dict[str, int] | None:
    """Return the Hugging Face tensors that make up `name` in order: key -> index of first element.

    None: the adapter does more than renaming and splitting along the first dimension, so the layer
    must be converted as a whole.

    Args:
        converted: what the adapter's `to_hf` makes of `layer`.
    """
    parts = {k: part for k, part in converted.items() if source_of(part, layer) == name}
    if sum(part.numel() for part in parts.values()) != layer[name].numel():
        return None
    return {key: part.storage_offset() for key, part in parts.items()}


def source_of(part: torch.Tensor, tensors: dict[str, torch.Tensor]) -> str | None:
    """Return the name of the tensor that `part` is contiguous elements of, or None."""
    storage = part.untyped_storage()._cdata
    for name, tensor in tensors.items():
        if tensor.untyped_storage()._cdata == storage and part.is_contiguous():
            return name
    return None


def copy_elements(
    source: SavedTensor, first: int, count: int, target: BinaryIO, at: int, dtype: torch.dtype
) -> None:
    """Write `count` elements from index `first` on to a file, from position `at` on, in `dtype`.

    Raises the errors of `SavedTensor.read`.
    """
    if dtype == source.dtype and sys.platform == "linux":
        for path, position, length, begin in source.places(first, first + count):
            with parse_again(path, partial(FileIO, path)) as file:
                copy_bytes(file, position, target, at + begin, length)
        return
    step = PIECE_BYTES // source.dtype.itemsize
    memory = torch.empty(min(step, count), dtype=source.dtype)
    for start in range(0, count, step):
        piece = memory[: count - start]
        source.read(first + start, piece)
        target.seek(at + start * dtype.itemsize)
        write_all(target, piece.to(dtype))


def copy_bytes(source: BinaryIO, start: int, target: BinaryIO, at: int, count: int) -> None:
    """Copy a part of a file into another within the kernel, as Linux can.

    Raises:
        CheckpointError: the source ends too early.
        OutageError: the source cannot be read.
        OSError: the target cannot be written.
    """
    target.flush()
    os.lseek(target.fileno(), at, os.SEEK_SET)
    end = start + count
    while start < end:
        try:
            sent = os.sendfile(target.fileno(), source.fileno(), start, end - start)
        except OSError:  # of either file
            parse_again(source.name, partial(os.pread, source.fileno(), 1, start))
            raise
        if not sent:
            raise CheckpointError(f"{source.name} is damaged: it ends too early")
        start += sent
