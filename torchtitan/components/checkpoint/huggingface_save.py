"""Write a sharded model as a Hugging Face folder, in pieces.

Rank 0 gathers which parts of which tensors each rank has; of replicas, one reports a part. It plans
the file of each tensor (by names and shapes alone, so that every layout writes the same bytes) and
the rank that writes each file. It sends each rank only that rank's share of the plan, since
thousands of ranks have millions of parts. Then the tensors are written a few rows at a time: ranks
with parts of these rows send them to the writer. So no rank holds more than its own part of the
model and one piece.

torch.distributed.checkpoint's HuggingFaceStorageWriter does not suffice: each rank serializes its
whole part in memory, into files of its own, and rank 0 then reads and rewrites the whole model.
"""

from __future__ import annotations

import math
import shutil
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn as nn

from torchtitan.config import JobConfig
from torchtitan.config.load import origin
from torchtitan.distributed.dtensor import local_tensor, offsets_of_all, replicas_of
from torchtitan.errors import CheckpointError, TitanError, begin_errors_with
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.runtime.collective_calls import on_all_ranks, on_rank_zero
from torchtitan.tools.garbage_collection import without_collection
from torchtitan.tools.logging import logger
from torchtitan.tools.text import first_line

from . import folder as folders
from .converted import adapter_of, by_layer, convert_sharded
from .huggingface import ExportAssets, name_of_weights, write_assets
from .model_tensors import buffer_names, dtype_of_copy, model_state, tied_embeddings
from .safetensors_files import (
    MAX_FILE_BYTES,
    PIECE_BYTES,
    SafetensorsWriter,
    TensorSpec,
    plan_files,
    write_index,
)
from .storage import sync_file

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes of a part of a tensor, at least one dimension each."""
Files = dict[str, dict[str, TensorSpec]]
"""Name of a file -> name of each of its tensors -> its spec."""


@dataclass(frozen=True)
class TensorPlan:
    """The rank that writes a tensor, and the file."""

    name: str
    spec: TensorSpec
    file: str
    writer: int


@dataclass
class Share:
    """The work of one rank. Tensors are identified by their index in `plan_tensors`."""

    sends: set[int] = field(default_factory=set)
    """Tensors of which the rank sends its part."""
    writes: dict[int, list[tuple[int, Box]]] = field(default_factory=dict)
    """For each tensor that the rank writes, the sender and box of each part. The parts cover the
    whole tensor, each element once, and are sorted by first row."""


def save_huggingface(
    model_parts: list[nn.Module],
    folder: Path,
    dtype: torch.dtype,
    assets: ExportAssets,
    group: dist.ProcessGroup,
) -> None:
    """Write the weights of a model, `config.json` and the tokenizer's files into `folder`.

    The folder appears when it is complete, replacing an older one. All ranks of `group` (gloo) call
    this together, with no other save in progress.

    Args:
        model_parts: this rank's parts of the model.
        dtype: dtype of floating-point tensors in the files, but see `dtype_of_copy`.
        assets: sources of the other files.

    Raises:
        CheckpointError: a rank could not write; raised on all ranks, and no files are left.
    """
    args = cast(BaseModelArgs, model_parts[0].args)
    state = _exported_state(model_parts)
    adapter, buffers = adapter_of(model_parts[0], folder), buffer_names(model_parts)
    hf_state: dict[str, torch.Tensor] = {}
    for layer in by_layer(state).values():
        hf_state |= convert_sharded(adapter.to_hf, layer)
    exact = adapter.to_hf({name: t for name, t in state.items() if name in buffers})
    local = _local_parts(hf_state)
    specs = {
        name: TensorSpec(dtype_of_copy(t.dtype, dtype, name in exact), tuple(t.shape))
        for name, t in hf_state.items()
    }
    parts = {
        name: (specs[name], box)
        for number, (name, (box, part)) in enumerate(local.items())
        if part.numel() and _tells(number, hf_state[name])
    }
    files, share = _agree_on_plan(parts, group, name_of_weights(args))

    partial = folders.partial_folder(folder)
    try:
        on_rank_zero(lambda: folders.begin(folder), group)
        _write_tensors(files, share, local, partial, group)

        def finish() -> None:
            write_index(partial, files)
            write_assets(partial, args, dtype, assets)
            for path in partial.iterdir():
                if path.name not in files:  # the writers of `files` have synced them
                    sync_file(path)
            folders.commit(folder)

        on_rank_zero(finish, group)
    except (OSError, TitanError) as error:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, TitanError):
            raise
        raise CheckpointError(f"{folder} could not be saved: {first_line(error)}") from error
    logger.info("saved %s", folder)


def check_export(model: nn.Module, job_config: JobConfig) -> None:
    """Check before training that `checkpoint.last_save_in_hf` can name all tensors.

    Args:
        model: the whole model, on the meta device.

    Raises:
        CheckpointError: the adapter does not know a tensor.
    """
    if job_config.checkpoint.last_save_in_hf:
        with begin_errors_with(origin(job_config, "checkpoint.last_save_in_hf")):
            adapter_of(model, Path()).to_hf(_exported_state([model]))


def _exported_state(model_parts: list[nn.Module]) -> dict[str, torch.Tensor]:
    tied = tied_embeddings(model_parts)
    return {k: t.detach() for k, t in model_state(model_parts).items() if k not in tied}


def _local_parts(state: dict[str, torch.Tensor]) -> dict[str, tuple[Box, torch.Tensor]]:
    """Return the box of this rank's part of each tensor, and the part; scalars become `[1]`."""
    parts = {}
    for (name, tensor), offsets in zip(state.items(), offsets_of_all(state.values()), strict=True):
        part = local_tensor(tensor)
        if part.ndim == 0:
            part, offsets = part.reshape(1), (0,)
        parts[name] = (offsets, tuple(part.shape)), part
    return parts


def _tells(number: int, tensor: torch.Tensor) -> bool:
    """Return whether this rank reports its part of a tensor; of replicas, one does."""
    group = replicas_of(tensor)
    return group is None or number % group.size() == group.rank()


@without_collection()
def _agree_on_plan(
    parts: dict[str, tuple[TensorSpec, Box]], group: dist.ProcessGroup, name: str
) -> tuple[Files, Share]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    gathered: Any = [None] * ranks if rank == 0 else None
    dist.gather_object(parts, gathered, dst=0, group=group)

    def plan() -> Files:
        specs = {name: spec for parts in gathered for name, (spec, _) in parts.items()}
        files = plan_files(specs, MAX_FILE_BYTES, name)
        shares.extend(share_out(plan_tensors(files, ranks), gathered))
        return files

    shares: list[Any] = []
    files = on_rank_zero(plan, group)
    if rank != 0:
        shares = [None]
        dist.recv_object_list(shares, 0, group=group)
    for other in range(1, len(shares)):  # a scatter would pad all shares to a writer's size
        dist.send_object_list([shares[other]], other, group=group)
    return files, shares[0]


def plan_tensors(files: Files, ranks: int) -> list[TensorPlan]:
    """Return the tensors in the order that all ranks process them, alternating between files."""
    stride = max(1, ranks // len(files))  # spread the writers over the nodes
    tensors_of_file = [
        [TensorPlan(name, spec, file, number * stride % ranks) for name, spec in of_file.items()]
        for number, (file, of_file) in enumerate(files.items())
    ]
    by_turns = zip_longest(*tensors_of_file)
    return [tensor for turn in by_turns for tensor in turn if tensor is not None]


def share_out(
    tensors: list[TensorPlan], parts_of_rank: list[dict[str, tuple[TensorSpec, Box]]]
) -> list[Share]:
    """Return the share of each rank. If several ranks have the same part, one sends it."""
    holders: dict[str, dict[Box, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, parts in enumerate(parts_of_rank):
        for name, (_, box) in parts.items():
            holders[name][box].append(rank)
    shares = [Share() for _ in parts_of_rank]
    for number, tensor in enumerate(tensors):
        senders = [
            (tensor.writer if tensor.writer in ranks else ranks[number % len(ranks)], box)
            for box, ranks in sorted(holders[tensor.name].items())
        ]
        held = sum(math.prod(sizes) for _, (_, sizes) in senders)
        if held != math.prod(tensor.spec.shape):
            raise RuntimeError(f"the ranks have {held} elements of {tensor.name}: {tensor.spec}")
        shares[tensor.writer].writes[number] = senders
        for sender, _ in senders:
            shares[sender].sends.add(number)
    return shares


def _write_tensors(
    files: Files,
    share: Share,
    local: dict[str, tuple[Box, torch.Tensor]],
    folder: Path,
    group: dist.ProcessGroup,
) -> None:
    """Write this rank's files, and send its parts to other writers.

    Raises the `OSError` of the lowest failed rank on all ranks. A failed writer still receives what
    other ranks send.
    """
    failed: list[OSError] = []
    writers: dict[str, SafetensorsWriter] = {}
    tensors = plan_tensors(files, dist.get_world_size())
    last_of_file = {tensor.file: tensor.name for tensor in tensors}
    for number, tensor in enumerate(tensors):
        own = local.get(tensor.name)
        if number not in share.writes:
            if number in share.sends and own is not None:
                _send(tensor, *own, group)
            continue
        if tensor.file not in writers and not failed:
            with _collected(failed):
                writers[tensor.file] = SafetensorsWriter(folder / tensor.file, files[tensor.file])
        part = None if own is None else own[1]
        for start, piece in _receive(tensor, share.writes[number], part, group):
            if not failed:
                with _collected(failed):
                    writers[tensor.file].write(tensor.name, piece, start)
        if tensor.name == last_of_file[tensor.file] and tensor.file in writers:
            with _collected(failed):
                writers.pop(tensor.file).close()

    def tell(rank: int, ranks: int) -> None:
        if failed:
            raise failed[0]

    on_all_ranks(tell, group)


@contextmanager
def _collected(errors: list[OSError]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        errors.append(error)


def _send(tensor: TensorPlan, box: Box, part: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Send this rank's part of a tensor to its writer, in pieces."""
    for start, stop in tensor.spec.pieces(PIECE_BYTES):
        rows = _rows_within(box, start, stop)
        if rows:
            piece = _take(part, box, rows).to("cpu", tensor.spec.dtype).contiguous()
            dist.send(piece.reshape(-1).view(torch.uint8), tensor.writer, group=group)


def _receive(
    tensor: TensorPlan, parts: list[tuple[int, Box]], own: Any, group: dist.ProcessGroup
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the first row of each piece of a tensor, and the piece, on the CPU.

    Args:
        parts: as in `Share.writes`.
        own: this rank's part, or None if it has none.
    """
    rank, dtype = dist.get_rank(), tensor.spec.dtype
    begins = [offsets[0] for _, (offsets, _) in parts]
    ends = list(accumulate((offsets[0] + sizes[0] for _, (offsets, sizes) in parts), max))
    for start, stop in tensor.spec.pieces(PIECE_BYTES):
        piece = torch.empty((stop - start, *tensor.spec.shape[1:]), dtype=dtype)
        for sender, box in parts[bisect_right(ends, start) : bisect_left(begins, stop)]:
            rows = _rows_within(box, start, stop)
            target = _place_in(piece, start, box, rows)
            if sender == rank:
                target.copy_(_take(own, box, rows))
            elif rows:
                received = torch.empty(target.shape, dtype=dtype)
                dist.recv(received.reshape(-1).view(torch.uint8), sender, group=group)
                target.copy_(received)
        yield start, piece


def _rows_within(box: Box, start: int, stop: int) -> range:
    """Return the rows of a part that lie between `start` and `stop`."""
    begin, rows = box[0][0], box[1][0]
    first = max(start, begin)
    return range(first, max(first, min(stop, begin + rows)))


def _take(part: torch.Tensor, box: Box, rows: range) -> torch.Tensor:
    first = box[0][0]
    return part[rows.start - first : rows.stop - first]


def _place_in(piece: torch.Tensor, start: int, box: Box, rows: range) -> torch.Tensor:
    """Return the view of `rows` and a box's columns in a piece whose first row is `start`."""
    columns = [slice(at, at + size) for at, size in zip(*box, strict=True)][1:]
    return piece[(slice(rows.start - start, rows.stop - start), *columns)]
