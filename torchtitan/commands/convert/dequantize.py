"""Makes a Hugging Face folder in bfloat16 of one with FP8 or MXFP4 weights, piece by piece.

* FP8 (DeepSeek-V3 and others): a matrix `NAME` is float8_e4m3fn, and `NAME_scale_inv`, in spite of
  its name, has a factor for each block of `weight_block_size` rows and columns.
* MXFP4 (gpt-oss; Microscaling Formats of the Open Compute Project, 1.0): `NAME_blocks` is uint8
  `[experts, rows, groups, 16]`, two 4-bit numbers a byte, the first in the low bits. `NAME_scales`
  `[experts, rows, groups]` are exponents of two, plus 127. `NAME` is
  `[experts, 32 * groups, rows]`, the transpose.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
import torch.nn.functional as F

from torchtitan.components.checkpoint.reader import files_of, read_safetensors_metadata
from torchtitan.components.checkpoint.retry import parse_again
from torchtitan.components.checkpoint.safetensors_files import (
    PIECE_BYTES,
    SafetensorsFile,
    SafetensorsWriter,
    TensorSpec,
    plan_files,
    weights_files,
    write_index,
)
from torchtitan.errors import CheckpointError, begin_errors_with, os_errors_as
from torchtitan.models.from_hf import CONFIG, read_hf_config
from torchtitan.tools.foreign_files import is_file

from .output import new_folder, with_progress

_SCALE, _BLOCKS, _SCALES = "_scale_inv", "_blocks", "_scales"
_FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
_PAIRS = torch.stack([_FP4.repeat(16), _FP4.repeat_interleave(16)], dim=1).bfloat16()
"""The two numbers of each byte, `[256, 2]`."""
_BIAS = 127

Pieces = Iterator[tuple[int, torch.Tensor]]
"""Consecutive rows of a tensor, with the number of the first."""


class _Tensor(NamedTuple):
    """A tensor to write."""

    spec: TensorSpec
    pieces: Callable[[], Pieces]


def dequantize(folder: Path, out: Path) -> int:
    """Write the model in `folder` to `out`, with its quantized weights in bfloat16.

    Other tensors keep their dtypes. Files at the top of the folder that hold no weights are copied.

    Returns:
        Bytes of all tensors.

    Raises:
        CheckpointError: `config.json` names no quantization of the two, or tensors do not fit it.
    """
    config = read_hf_config(folder)
    with begin_errors_with(str(folder / CONFIG)):
        find = _method_of(config)
    places = files_of(read_safetensors_metadata(folder))
    with ExitStack() as stack:
        opened = {
            name: stack.enter_context(SafetensorsFile(folder / name))
            for name in set(places.values())
        }
        source = _Source({key: opened[name] for key, name in places.items()})
        with begin_errors_with(str(folder)):
            tensors = dict(find(source))
        tensors |= {key: _copied(source, key) for key in source.left()}
        specs = {key: tensor.spec for key, tensor in tensors.items()}
        with new_folder(out) as part:
            _copy_other_files(folder, part, config)
            files = plan_files(specs)
            for name, of_file in with_progress(files.items(), len(files)):
                writer = SafetensorsWriter(part / name, of_file)
                for key in of_file:
                    for start, piece in tensors[key].pieces():
                        writer.write(key, piece, start)
                writer.close()
            write_index(part, files)
    return sum(spec.nbytes for spec in specs.values())


class _Source:
    """The tensors of a folder, which are taken one after another."""

    def __init__(self, files: Mapping[str, SafetensorsFile]) -> None:
        self._files = files
        self._taken: set[str] = set()

    def ending_in(self, end: str) -> list[str]:
        """Return the names before `end` of the tensors whose names end in it."""
        return [key.removesuffix(end) for key in self._files if key.endswith(end)]

    def left(self) -> list[str]:
        return [key for key in self._files if key not in self._taken]

    def spec(self, key: str) -> TensorSpec:
        return self._files[key].specs[key]

    def read(self, key: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        file = self._files[key]
        return parse_again(file.path, partial(file.read, key, start, stop))

    def take(
        self, key: str, dtype: torch.dtype | None, shape: tuple[int | None, ...]
    ) -> TensorSpec:
        """Mark a tensor as read. Raises `CheckpointError` if it is absent, or another."""
        self._taken.add(key)
        if key not in self._files:
            raise CheckpointError(f"{key} is missing")
        spec = self.spec(key)
        fits = len(spec.shape) == len(shape) and all(
            b in (None, a) for a, b in zip(spec.shape, shape, strict=True)
        )
        if not fits or dtype not in (None, spec.dtype):
            wanted = ", ".join("_" if size is None else str(size) for size in shape)
            raise CheckpointError(
                f"{key} is {spec.dtype} {list(spec.shape)}, but must be "
                f"{dtype or 'of any dtype'} [{wanted}]"
            )
        return spec


def _method_of(config: dict[str, Any]) -> Callable[[_Source], Iterator[tuple[str, _Tensor]]]:
    quantization = config.get("quantization_config") or {}
    match quantization.get("quant_method"):
        case "fp8":
            block = quantization.get("weight_block_size")
            if not isinstance(block, list) or [type(size) for size in block] != [int, int]:
                raise CheckpointError(
                    f"weight_block_size = {block!r} is not supported: FP8 weights must be scaled "
                    "by blocks of rows and columns, such as [128, 128]"
                )
            return partial(_find_fp8, block=tuple(block))
        case "mxfp4":
            return _find_mxfp4
        case None:
            raise CheckpointError("it has no quantization_config: the weights are not quantized")
        case method:
            raise CheckpointError(f"quant_method = {method!r} is not supported: fp8 and mxfp4 are")


def _find_fp8(source: _Source, block: tuple[int, int]) -> Iterator[tuple[str, _Tensor]]:
    for name in source.ending_in(_SCALE):
        rows, columns = source.take(name, torch.float8_e4m3fn, (None, None)).shape
        blocks = math.ceil(rows / block[0]), math.ceil(columns / block[1])
        source.take(name + _SCALE, None, blocks)
        spec = TensorSpec(torch.bfloat16, (rows, columns))
        yield name, _Tensor(spec, partial(_from_fp8, source, name, block))
    for name in source.left():
        if source.spec(name).dtype.itemsize == 1:
            raise CheckpointError(f"{name} is {source.spec(name).dtype} without {name}{_SCALE}")


def _from_fp8(source: _Source, name: str, block: tuple[int, int]) -> Pieces:
    scales = source.read(name + _SCALE).float()
    rows, columns = source.spec(name).shape
    for number, scale in enumerate(scales):
        start = number * block[0]
        quantized = source.read(name, start, min(start + block[0], rows))
        factors = scale.repeat_interleave(block[1])[:columns]
        yield start, (quantized.float() * factors).bfloat16()


def _find_mxfp4(source: _Source) -> Iterator[tuple[str, _Tensor]]:
    for name in source.ending_in(_BLOCKS):
        shape = (None, None, None, 16)
        experts, rows, groups, _ = source.take(name + _BLOCKS, torch.uint8, shape).shape
        source.take(name + _SCALES, torch.uint8, (experts, rows, groups))
        spec = TensorSpec(torch.bfloat16, (experts, 32 * groups, rows))
        yield name, _Tensor(spec, partial(_from_mxfp4, source, name))
    for name in source.left():
        if source.spec(name).dtype.itemsize == 1:
            problem = f"but belongs to no {_BLOCKS} and {_SCALES}"
            raise CheckpointError(f"{name} is {source.spec(name).dtype}, {problem}")


def _from_mxfp4(source: _Source, name: str) -> Pieces:
    for expert in range(source.spec(name + _BLOCKS).rows):
        blocks, scales = (
            source.read(name + part, expert, expert + 1).int() for part in (_BLOCKS, _SCALES)
        )
        factors = torch.ldexp(torch.ones(scales.shape), scales - _BIAS).bfloat16()
        numbers = F.embedding(blocks, _PAIRS)  # [1, rows, groups, 16, 2]
        yield expert, (numbers * factors[..., None, None]).flatten(2).transpose(1, 2)


def _copied(source: _Source, key: str) -> _Tensor:
    spec = source.spec(key)

    def pieces() -> Pieces:
        for start, stop in spec.pieces():
            yield start, source.read(key, start, stop)

    return _Tensor(spec, pieces)


def _copy_other_files(folder: Path, out: Path, config: dict[str, Any]) -> None:
    weights = {file.name for file in weights_files(folder)}
    for file in folder.iterdir():
        holds_weights = file.suffix == ".safetensors" or file.name in weights
        if not holds_weights and is_file(file, CheckpointError):
            _copy(file, out / file.name)
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    config["dtype" if "dtype" in config else "torch_dtype"] = "bfloat16"
    (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _copy(file: Path, out: Path) -> None:
    with os_errors_as(CheckpointError, f"{file} cannot be read"):
        source = file.open("rb")
    with source, out.open("wb") as target:
        while piece := _next_piece(source):
            target.write(piece)


def _next_piece(file: BinaryIO) -> bytes:
    with os_errors_as(CheckpointError, f"{file.name} cannot be read"):
        return file.read(PIECE_BYTES)
