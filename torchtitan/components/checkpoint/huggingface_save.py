"""Writes a sharded model as a Hugging Face folder, in pieces.

Rank 0 learns which parts of which tensors each rank has, and plans: which tensor goes into which
file (by names and shapes alone, so that every layout writes the same bytes), and which rank writes
a file. Then the tensors go by, a few rows at a time: the ranks that have parts of these rows send
them to the writer. So no rank holds more than its own part of the model and one piece.

torch.distributed.checkpoint's HuggingFaceStorageWriter was not enough: each rank serializes all of
its part in memory, into files of its own, and rank 0 then reads and writes the whole model again.
"""

from __future__ import annotations

import logging
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from torchtitan.distributed.same_outcome import on_rank_zero
from torchtitan.errors import CheckpointError
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.tools.text import first_line

from . import folder as folders
from .huggingface import ExportAssets, write_assets
from .load import adapter_of, buffer_names, dtype_of_copy, model_state, tied_names
from .safetensors_files import (
    MAX_FILE_BYTES,
    PIECE_BYTES,
    SafetensorsWriter,
    TensorSpec,
    plan_files,
    write_index,
)
from .storage import sync_file

logger = logging.getLogger("torchtitan")

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes of a part of a tensor, at least one dimension each."""


@dataclass(frozen=True)
class TensorPlan:
    """Who sends what of a tensor, and who writes it."""

    name: str
    spec: TensorSpec
    file: str
    writer: int
    parts: list[tuple[int, Box]]
    """Rank and the part that it sends; together the whole tensor, each element once."""

    def overlaps(self, start: int, stop: int) -> Iterator[tuple[int, Box, slice]]:
        """Of each part that has some of the rows from `start` to `stop`: rank, part, which rows."""
        for sender, box in self.parts:
            begin, rows = box[0][0], box[1][0]
            first, end = max(start, begin), min(stop, begin + rows)
            if first < end:
                yield sender, box, slice(first, end)


@dataclass(frozen=True)
class SavePlan:
    files: dict[str, dict[str, TensorSpec]]
    tensors: list[TensorPlan]
    """In the order in which all ranks go through them: those of different files take turns."""


def save_huggingface(
    model_parts: list[nn.Module],
    folder: Path,
    dtype: torch.dtype,
    assets: ExportAssets,
    group: dist.ProcessGroup,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write the weights of a model, `config.json` and the tokenizer's files into `folder`.

    The folder appears when it is complete, in place of an older one. All ranks of `group` (gloo)
    call this together.

    Args:
        model_parts: this rank's parts of the model.
        dtype: of floating-point tensors in the files, but see `dtype_of_copy`.
        assets: where the other files come from.

    Raises:
        CheckpointError: on all ranks, if one of them could not write; nothing is left of it then.
    """
    args = cast(BaseModelArgs, model_parts[0].args)
    tied = tied_names(model_parts)
    state = {k: t.detach() for k, t in model_state(model_parts).items() if k not in tied}
    adapter, buffers = adapter_of(model_parts[0], folder), buffer_names(model_parts)
    hf_state = adapter.to_hf(state)
    exact = adapter.to_hf({name: t for name, t in state.items() if name in buffers})
    local = {name: _local_part(tensor) for name, tensor in hf_state.items()}
    specs = {
        name: TensorSpec(dtype_of_copy(t.dtype, dtype, name in exact), tuple(t.shape))
        for name, t in hf_state.items()
    }
    parts = {name: (specs[name], box) for name, (box, part) in local.items() if part.numel()}
    plan = _agree_on_plan(parts, group, max_file_bytes)

    partial = folders.partial_folder(folder)
    try:
        on_rank_zero(lambda: _begin(folder), group)
        own = {name: part for name, (_, part) in local.items()}
        _write_tensors(plan, own, partial, group)

        def finish() -> None:
            write_index(partial, plan.files)
            write_assets(partial, args, dtype, assets)
            for path in partial.iterdir():
                if path.name not in plan.files:  # which their writers have synced
                    sync_file(path)
            folders.commit(folder)

        on_rank_zero(finish, group)
    except OSError as error:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"{folder} could not be saved: {first_line(error)}") from error
    logger.info("saved %s", folder)


def _begin(folder: Path) -> None:
    folders.restore_replaced(folder.parent)
    partial = folders.partial_folder(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _local_part(tensor: torch.Tensor) -> tuple[Box, torch.Tensor]:
    """Where this rank's part of a tensor is in the whole, and the part; scalars become `[1]`."""
    part, offsets = tensor, (0,) * tensor.ndim
    if isinstance(tensor, DTensor):
        part = tensor.to_local()
        _, offsets = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
    if part.ndim == 0:
        part, offsets = part.reshape(1), (0,)
    return (tuple(offsets), tuple(part.shape)), part


def _agree_on_plan(
    parts: dict[str, tuple[TensorSpec, Box]], group: dist.ProcessGroup, max_file_bytes: int
) -> SavePlan:
    gathered: Any = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(parts, gathered, dst=0, group=group)
    return on_rank_zero(lambda: _make_plan(gathered, max_file_bytes), group)


def _make_plan(
    parts_of_rank: list[dict[str, tuple[TensorSpec, Box]]], max_file_bytes: int
) -> SavePlan:
    specs: dict[str, TensorSpec] = {}
    holders: dict[str, dict[Box, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, parts in enumerate(parts_of_rank):
        for name, (spec, box) in parts.items():
            specs[name] = spec
            holders[name][box].append(rank)

    files = plan_files(specs, max_file_bytes)
    stride = max(1, len(parts_of_rank) // len(files))  # so that nodes share the work
    tensors_of_file = []
    for number, (file, of_file) in enumerate(files.items()):
        writer = number * stride % len(parts_of_rank)
        tensors = []
        for i, (name, spec) in enumerate(of_file.items()):
            senders = [
                (writer if writer in ranks else ranks[i % len(ranks)], box)
                for box, ranks in sorted(holders[name].items())
            ]
            _check_complete(name, spec, [box for _, box in senders])
            tensors.append(TensorPlan(name, spec, file, writer, senders))
        tensors_of_file.append(tensors)
    by_turns = zip_longest(*tensors_of_file)
    return SavePlan(files, [tensor for turn in by_turns for tensor in turn if tensor is not None])


def _check_complete(name: str, spec: TensorSpec, boxes: list[Box]) -> None:
    held = sum(torch.Size(sizes).numel() for _, sizes in boxes)
    if held != torch.Size(spec.shape).numel():
        raise RuntimeError(f"the ranks have {held} elements of {name}, which is {spec.shape}")


def _write_tensors(
    plan: SavePlan, own: dict[str, torch.Tensor], folder: Path, group: dist.ProcessGroup
) -> None:
    """Raises the first rank's `OSError` on all ranks; what other ranks send is received still."""
    rank, failed = dist.get_rank(), _FirstError()
    writers: dict[str, SafetensorsWriter] = {}
    last_of_file = {tensor.file: tensor.name for tensor in plan.tensors}
    for tensor in plan.tensors:
        if tensor.writer == rank and tensor.file not in writers and failed.error is None:
            with failed:
                path = folder / tensor.file
                writers[tensor.file] = SafetensorsWriter(path, plan.files[tensor.file])
        for start, piece in _pieces(tensor, own.get(tensor.name), rank, group):
            if failed.error is None:
                with failed:
                    writers[tensor.file].write(tensor.name, piece, start)
        if tensor.name == last_of_file[tensor.file] and tensor.file in writers:
            with failed:
                writers.pop(tensor.file).close()
    errors: list[OSError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, failed.error, group=group)
    first = next((error for error in errors if error is not None), None)
    if first is not None:
        raise first


class _FirstError:
    """Goes on after an `OSError` within it, of which it keeps the first."""

    error: OSError | None = None

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if not isinstance(error, OSError):
            return False
        self.error = self.error or error
        return True


def _pieces(
    tensor: TensorPlan, own: Any, rank: int, group: dist.ProcessGroup
) -> Iterator[tuple[int, torch.Tensor]]:
    """Move the tensor's rows to its writer. The writer gets first rows and pieces, on the CPU.

    `own`: this rank's part of the tensor, or None if it has none.
    """
    writing = rank == tensor.writer
    if not writing and all(sender != rank for sender, _ in tensor.parts):
        return
    dtype = tensor.spec.dtype
    for start, stop in tensor.spec.pieces(PIECE_BYTES):
        piece = torch.empty((stop - start if writing else 0, *tensor.spec.shape[1:]), dtype=dtype)
        for sender, box, rows in tensor.overlaps(start, stop):
            if rank == sender:
                first = box[0][0]
                part = own[rows.start - first : rows.stop - first]
                if writing:
                    _place_in(piece, start, box, rows).copy_(part)
                else:
                    part = part.to("cpu", dtype).contiguous()
                    dist.send(part.reshape(-1).view(torch.uint8), tensor.writer, group=group)
            elif writing:
                target = _place_in(piece, start, box, rows)
                received = torch.empty(target.shape, dtype=dtype)
                dist.recv(received.reshape(-1).view(torch.uint8), sender, group=group)
                target.copy_(received)
        if writing:
            yield start, piece


def _place_in(piece: torch.Tensor, start: int, box: Box, rows: slice) -> torch.Tensor:
    """Of the rows from `start` on of a tensor, those `rows`, with the columns that a box has."""
    columns = [slice(at, at + size) for at, size in zip(*box, strict=True)][1:]
    return piece[(slice(rows.start - start, rows.stop - start), *columns)]
