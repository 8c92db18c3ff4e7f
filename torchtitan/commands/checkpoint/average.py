"""Averages the weights of several checkpoints of one model."""

from __future__ import annotations

import os
from functools import reduce
from pathlib import Path
from typing import BinaryIO

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from torchtitan.commands.convert.output import new_folder, refuse_existing, save_one_by_one
from torchtitan.components.checkpoint.huggingface import TRAINING_ONLY
from torchtitan.components.checkpoint.manifest import Manifest
from torchtitan.components.checkpoint.retry import read_again
from torchtitan.components.checkpoint.saved_tensors import save_hole, write_all
from torchtitan.components.run_folder import CONFIG_FILE
from torchtitan.errors import CheckpointError
from torchtitan.tools.differences import nested_differences

from .diff import PIECE, Side

_PREFIX = "model."


def average(locations: list[str], out: Path) -> Manifest:
    """Write the mean of the weights in checkpoints as the checkpoint `out`, of the model alone.

    Integers, such as counts, are those of the checkpoint with the most steps. So is everything that
    describes the model (arXiv:1803.05407 and 2203.05482).

    Args:
        locations: checkpoints of ours, by path or URL; one that is given twice weighs twice.
    """
    refuse_existing(out)
    sides = [Side(location) for location in locations]
    for side in sides:
        if side.is_hf:
            raise CheckpointError(
                f"{side.folder} is a Hugging Face folder. First convert it: torchtitan convert "
                f"from-hf {side.folder} OUT"
            )
    last = max(sides, key=lambda side: side.manifest.step)
    for side in sides:
        _refuse_another_model(side, last)
    for folder, manifest in {str(s.folder): (s.folder, s.manifest) for s in sides}.values():
        manifest.check_contents(folder, manifest.files)
    data = {key: value for key, value in last.manifest.data.items() if key != "sources"}
    manifest = Manifest(last.manifest.step, True, last.manifest.model, data)
    planned = {name: _mean_on_meta(_PREFIX + name, sides) for name in _weights(last)}
    with new_folder(out) as partial:
        if CONFIG_FILE in last.manifest.files:
            config = last.folder / CONFIG_FILE
            (partial / CONFIG_FILE).write_bytes(read_again(config, config.read_bytes))

        def write(name: str, file: BinaryIO) -> None:
            counts = not (planned[name].is_floating_point() or planned[name].is_complex())
            _write_mean(_PREFIX + name, [last] if counts else sides, planned[name], file)

        save_one_by_one(partial, manifest, planned, write)
    return manifest


def _weights(side: Side) -> dict[str, TensorStorageMetadata]:
    return {
        key.removeprefix(_PREFIX): entry
        for key, entry in side.entries.items()
        if key.startswith(_PREFIX)
    }


def _mean_on_meta(key: str, sides: list[Side]) -> torch.Tensor:
    """Return the mean on the meta device, in a dtype that holds the values of all."""
    entries = [side.entries[key] for side in sides]
    dtype = reduce(torch.promote_types, [entry.properties.dtype for entry in entries])
    return torch.empty(entries[0].size, dtype=dtype, device="meta")


def _refuse_another_model(side: Side, last: Side) -> None:
    was, now = ({key: s.manifest.model.get(key) for key in ("name", "args")} for s in (side, last))
    own, theirs = ({n: list(e.size) for n, e in _weights(s).items()} for s in (side, last))
    found = nested_differences(was, now, TRAINING_ONLY)
    others = [f"{name} = {a} and {b}" for name, a, b in found]
    others += [
        f"{name} in only one of them" if None in (a, b) else f"{name} of shapes {a} and {b}"
        for name, a, b in nested_differences(own, theirs)
    ]
    if others:
        raise CheckpointError(
            f"{side.folder} and {last.folder} hold different models, whose mean is none: "
            f"{others[0]}"
        )


def _write_mean(key: str, sides: list[Side], planned: torch.Tensor, file: BinaryIO) -> None:
    """Append the mean of a tensor to `file`, a piece at a time."""
    position = save_hole(file, planned.shape, planned.dtype)
    wide = torch.complex128 if planned.is_complex() else torch.float64
    readers = [side.reader(key) for side in sides]
    for start in range(0, planned.numel(), PIECE):
        size = min(PIECE, planned.numel() - start)
        total = torch.zeros(size, dtype=wide)
        for side, read in zip(sides, readers, strict=True):
            piece = torch.empty(size, dtype=side.entries[key].properties.dtype)
            read(start, piece)
            total += piece.to(wide)
        mean = (total / len(sides) if len(sides) > 1 else piece).to(planned.dtype)
        file.seek(position + start * planned.itemsize)
        write_all(file, mean)
    file.seek(0, os.SEEK_END)
