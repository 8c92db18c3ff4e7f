"""Read and write safetensors files a few rows at a time.

The library `safetensors` needs all tensors in memory to write a file. It reads by mapping the file,
whose pages then count as the process's memory. These classes hold only the rows that they are given
or asked for.

A file consists of the length of the header (8 bytes, little endian), the header (JSON: name ->
dtype, shape, and begin and end of its bytes, counted from the end of the header), and the bytes.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open

from torchtitan.errors import CheckpointError
from torchtitan.tools.foreign_files import is_file
from torchtitan.tools.text import natural_order

from .retry import parse_again
from .saved_tensors import read_all, write_all

SAFETENSORS_INDEX = "model.safetensors.index.json"
SAFETENSORS_FILE = "model.safetensors"
_NAMES = (
    (SAFETENSORS_FILE, SAFETENSORS_INDEX),
    ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"),
)
"""Of weights in a single file and of the index of several: transformers', then diffusers'."""
MAX_FILE_BYTES = 5 * 10**9
"""Larger models are written as several files, as `save_pretrained` does."""
PIECE_BYTES = 64 * 2**20
"""Size of the pieces in which rows are read, sent and written."""

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def weights_files(folder: Path) -> tuple[Path, Path]:
    """Return the single file and the index under the name that the weights of a folder have.

    They need not exist.
    """
    pairs = [(folder / single, folder / index) for single, index in _NAMES]
    found = (pair for pair in pairs if any(is_file(file, CheckpointError) for file in pair))
    return next(found, pairs[0])


@dataclass(frozen=True)
class TensorSpec:
    """Dtype and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, an entry of the first dimension."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def rows(self) -> int:
        """Size of the first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    def pieces(self, piece_bytes: int = PIECE_BYTES) -> Iterator[tuple[int, int]]:
        """Yield the first row and the end row (exclusive) of pieces of about `piece_bytes`."""
        step = max(1, piece_bytes // max(1, self.row_bytes))
        for start in range(0, self.rows, step):
            yield start, min(start + step, self.rows)


class SafetensorsFile:
    """A file open for reading. Use it in a `with` block.

    Raises:
        CheckpointError: the file is missing or damaged.
        OutageError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file, header, data = parse_again(path, self._open)
        header.pop("__metadata__", None)
        self.specs: dict[str, TensorSpec] = {}
        self.starts: dict[str, int] = {}
        """Positions of the tensors in the file."""
        for name, entry in header.items():
            if entry["dtype"] not in _DTYPES:
                raise CheckpointError(
                    f"{path} is not readable: {name} has dtype {entry['dtype']}. Known: "
                    f"{', '.join(_DTYPES)}"
                )
            self.specs[name] = TensorSpec(_DTYPES[entry["dtype"]], tuple(entry["shape"]))
            self.starts[name] = data + entry["data_offsets"][0]

    def _open(self) -> tuple[Any, dict[str, Any], int]:
        """Return the open file, its header, and the position of the bytes after it."""
        if not stat.S_ISREG(self.path.stat().st_mode):
            raise FileNotFoundError  # a pipe would block, a folder would look like an outage
        with safe_open(self.path, framework="pt"):
            pass  # the library checks the header and length of the file
        file = open(self.path, "rb", buffering=0)  # noqa: SIM115
        header_bytes = int.from_bytes(file.read(8), "little")
        return file, json.loads(file.read(header_bytes)), 8 + header_bytes

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return rows `start` to `stop` of a tensor in the file's dtype; a scalar has one row."""
        spec = self.specs[name]
        stop = spec.rows if stop is None else stop
        shape = (stop - start, *spec.shape[1:]) if spec.shape else ()
        tensor = torch.empty(shape, dtype=spec.dtype)
        if tensor.numel():
            self._file.seek(self.starts[name] + start * spec.row_bytes)
            read_all(self._file, tensor.view(-1).view(torch.uint8).numpy().data, self.path)
        return tensor

    def read_part(self, name: str, part: tuple[slice, ...], target: torch.Tensor) -> None:
        """Copy a part of a tensor into `target`, which may have another dtype and device."""
        if not part:
            target.copy_(self.read(name))
            return
        rows, *rest = part
        columns = (slice(None), *rest)
        spec = self.specs[name]
        wanted = TensorSpec(spec.dtype, (rows.stop - rows.start, *spec.shape[1:]))
        for start, stop in wanted.pieces():
            piece = self.read(name, rows.start + start, rows.start + stop)
            target[start:stop].copy_(piece[columns])

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class SafetensorsWriter:
    """A file open for writing in any order, complete once all rows of all tensors are written."""

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        self.specs = specs
        self._starts: dict[str, int] = {}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, spec in specs.items():
            self._starts[name] = end
            header[name] = {
                "dtype": _DTYPE_NAMES[spec.dtype],
                "shape": spec.shape,
                "data_offsets": [end, end + spec.nbytes],
            }
            end += spec.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # data begins at a multiple of 8 bytes
        self._data = 8 + len(text)
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._data + end)

    def write(self, name: str, tensor: torch.Tensor, start: int = 0) -> None:
        """Write rows from row `start` on. The tensor is on the CPU and has the file's dtype."""
        spec = self.specs[name]
        assert (tensor.dtype, tensor.shape[1:]) == (spec.dtype, spec.shape[1:]), name
        self._file.seek(self._data + self._starts[name] + start * spec.row_bytes)
        write_all(self._file, tensor.contiguous())

    def place_of(self, name: str) -> tuple[BinaryIO, int]:
        """Return the open file and the position of a tensor in it."""
        return self._file, self._data + self._starts[name]

    def close(self) -> None:
        """Close the file once it is on disk."""
        os.fsync(self._file.fileno())
        self._file.close()


def plan_files(
    specs: Mapping[str, TensorSpec], max_file_bytes: int = MAX_FILE_BYTES, name: str = "model"
) -> dict[str, dict[str, TensorSpec]]:
    """Assign tensors to files, `NAME-00001-of-00002.safetensors` and so on.

    The result depends only on names, dtypes and shapes. A tensor is never split between files.
    """
    files: list[dict[str, TensorSpec]] = []
    size = 0
    for key in sorted(specs, key=natural_order):
        if not files or size + specs[key].nbytes > max_file_bytes:
            files.append({})
            size = 0
        files[-1][key] = specs[key]
        size += specs[key].nbytes
    return {f"{name}-{i:05}-of-{len(files):05}.safetensors": f for i, f in enumerate(files, 1)}


def write_index(folder: Path, files: Mapping[str, Mapping[str, TensorSpec]]) -> None:
    """Write `NAME.safetensors.index.json`, which maps each tensor to its file."""
    index = {
        "metadata": {"total_size": sum(s.nbytes for f in files.values() for s in f.values())},
        "weight_map": {name: file for file, specs in files.items() for name in specs},
    }
    name = next(iter(files)).partition("-")[0]
    path = folder / f"{name}.safetensors.index.json"
    path.write_text(json.dumps(index, indent=2) + "\n")
