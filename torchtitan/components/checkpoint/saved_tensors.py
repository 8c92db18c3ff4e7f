"""Locate the bytes of a tensor in files, to stream them.

torch.distributed.checkpoint saves every tensor, or each rank's part of it, with `torch.save`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view
from torch.serialization import skip_data

from torchtitan.errors import CheckpointError

from .retry import parse_again
from .storage import StoragePath


def save_hole(file: BinaryIO, shape: Sequence[int], dtype: torch.dtype) -> int:
    """Save a tensor without its bytes at the end of `file`; return the position of the bytes."""
    start = file.tell()
    with skip_data():
        torch.save(torch.empty(shape, dtype=dtype), file)
    end = file.tell()
    file.flush()
    data = start + _data_offset(file, start, end - start)
    file.seek(end)
    return data


@dataclass(frozen=True)
class _Run:
    """Contiguous elements of a tensor in a file."""

    start: int
    stop: int
    path: StoragePath
    data: int
    """Position of the first element in the file."""


class SavedTensor:
    """A tensor in files, whose elements can be read in order, some at a time."""

    def __init__(self, runs: list[_Run], entry: TensorStorageMetadata) -> None:
        self._runs = runs
        self.shape = entry.size
        self.dtype = entry.properties.dtype

    @classmethod
    def find(cls, folder: StoragePath, metadata: Metadata, key: str) -> SavedTensor | None:
        """Find a tensor of ours; return None if its parts are not runs of contiguous elements.

        Raises:
            CheckpointError: a file is damaged.
            OutageError: a file cannot be read.
        """
        entry: Any = metadata.state_dict_metadata[key]
        row = math.prod(entry.size[1:])
        runs = []
        for chunk in entry.chunks:
            if chunk.sizes[1:] != entry.size[1:]:
                return None
            info = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
            path = folder / info.relative_path
            saved, data = parse_again(path, partial(_find_stored, path, info.offset, info.length))
            if not saved.is_contiguous() or saved.storage_offset():
                return None
            start = chunk.offsets[0] * row if chunk.offsets else 0
            runs.append(_Run(start, start + math.prod(chunk.sizes), path, data))
        return cls(runs, entry)

    @classmethod
    def in_safetensors(cls, folder: Path, metadata: Metadata, key: str) -> SavedTensor:
        """Return a tensor of a Hugging Face folder; `metadata`: `read_safetensors_metadata`."""
        entry: Any = metadata.state_dict_metadata[key]
        [whole] = entry.chunks
        at = metadata.storage_data[MetadataIndex(key, whole.offsets)]
        run = _Run(0, entry.size.numel(), folder / at.relative_path, at.offset)
        return cls([run], entry)

    def whole(self) -> torch.Tensor:
        """Return the tensor. Raises the errors of `read`."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self.read(0, tensor.view(-1))
        return tensor

    def places(self, start: int, stop: int) -> Iterator[tuple[StoragePath, int, int, int]]:
        """Locate the elements from index `start` to `stop`, as runs of bytes.

        Yields:
            For each run, its file, position in the file, length, and offset in the requested bytes.
        """
        size = self.dtype.itemsize
        for run in self._runs:
            first, end = max(start, run.start), min(stop, run.stop)
            if first < end:
                position = run.data + (first - run.start) * size
                yield run.path, position, (end - first) * size, (first - start) * size

    def read(self, start: int, out: torch.Tensor) -> None:
        """Fill `out`, flat and of the tensor's dtype, with the elements from index `start` on.

        Raises:
            CheckpointError: a file is damaged.
            OutageError: a file cannot be read.
        """
        buffer = out.view(torch.uint8).numpy().data
        for path, position, length, at in self.places(start, start + len(out)):
            parse_again(path, partial(_read_at, path, position, buffer[at : at + length]))


def _read_at(path: StoragePath, position: int, buffer: memoryview) -> None:
    with path.open("rb", buffering=0) as file:
        file.seek(position)
        read_all(file, buffer, path)


def read_all(file: Any, buffer: memoryview, path: StoragePath | str) -> None:
    """Fill the buffer from `file`. Raises `CheckpointError` if the file ends too early."""
    while len(buffer):
        got = file.readinto(buffer)
        if not got:
            raise CheckpointError(f"{path} is damaged: it ends too early")
        buffer = buffer[got:]


def write_all(file: BinaryIO, tensor: torch.Tensor) -> None:
    """Write the elements of a contiguous tensor on the CPU."""
    buffer = tensor.detach().view(-1).view(torch.uint8).numpy().data
    while len(buffer):  # an unbuffered file may take less at once
        buffer = buffer[file.write(buffer) :]


def _find_stored(path: StoragePath, start: int, length: int) -> tuple[torch.Tensor, int]:
    """Return the tensor saved at `start`, without its elements, and the elements' position."""
    with path.open("rb") as file:
        view: Any = _create_file_view(cast(Any, file), start, length)
        with skip_data():
            saved = torch.load(view, map_location="cpu", weights_only=True)
        return saved, start + _data_offset(file, start, length)


def _data_offset(file: Any, start: int, length: int) -> int:
    """Return the position, relative to `start`, of the elements of the tensor saved there."""
    reader: Any = torch._C.PyTorchFileReader(cast(Any, _create_file_view(file, start, length)))
    return reader.get_record_offset("data/0")
