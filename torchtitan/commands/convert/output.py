"""Writes the output folder of a conversion or an average, completely or not at all."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

import torch
from rich.console import Console
from rich.progress import track
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from torchtitan.components.checkpoint.folder import partial_folder
from torchtitan.components.checkpoint.manifest import METADATA, Manifest
from torchtitan.components.checkpoint.reader import add_whole_tensor
from torchtitan.components.checkpoint.storage import (
    FileRecord,
    is_there,
    make_folder,
    sizes_in,
    sync_file,
    sync_folder,
)
from torchtitan.components.checkpoint.writer import cause_of_failed_write
from torchtitan.errors import CheckpointError, os_errors_as

T = TypeVar("T")

FILE = "__0_0.distcp"

WriteTensor = Callable[[str, BinaryIO], None]
"""Appends the tensor of a name to a file, in the format of `torch.save`."""


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield `OUT.partial` for files, which becomes `OUT` when they are on disk. Errors delete it.

    Raises:
        CheckpointError: `OUT` exists, or it cannot be written; `OutageError`: not now.
    """
    refuse_existing(out)
    partial = partial_folder(out)
    with os_errors_as(CheckpointError, f"{out} could not be written"):
        make_folder(out.parent)
        partial.mkdir()
        try:
            yield partial
            _refuse(out)
            for file in partial.iterdir():
                sync_file(file)
            sync_folder(partial)
            partial.rename(out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync_folder(out.parent)


def refuse_existing(out: Path) -> None:
    """Raise `CheckpointError` if the folder, or an unfinished one of its name, exists."""
    _refuse(out)
    if is_there(partial_folder(out)):
        raise CheckpointError(
            f"{partial_folder(out)} exists, perhaps left by a command that was interrupted. Delete "
            "it first"
        )


def _refuse(out: Path) -> None:
    if is_there(out):
        raise CheckpointError(f"{out} exists, and nothing is overwritten")


def with_progress(items: Iterable[T], total: int) -> Iterable[T]:
    """Return the items, with a progress bar on stderr if that is a terminal."""
    console = Console(stderr=True)
    return track(items, "writing", total=total, console=console, disable=not console.is_terminal)


def save_one_by_one(
    folder: Path, manifest: Manifest, planned: dict[str, torch.Tensor], write: WriteTensor
) -> None:
    """Write a checkpoint of the model alone into one file, with one tensor in memory at a time.

    PyTorch's own writers keep all tensors of a file in memory until it is complete.

    Args:
        folder: a `new_folder`, empty or with further files of the checkpoint.
        manifest: without the files, which are added.
        planned: name -> a meta tensor of its shape and dtype.
    """
    metadata = Metadata({}, {}, {}, StorageMeta(), CURRENT_DCP_VERSION)
    with open(folder / FILE, "w+b") as file:
        for name, tensor in with_progress(planned.items(), len(planned)):
            start = file.tell()
            try:
                write(name, file)
            except Exception as error:
                raise cause_of_failed_write(error) from None
            place = _StorageInfo(FILE, start, file.tell() - start)
            add_whole_tensor(metadata, f"model.{name}", tensor.dtype, tensor.shape, place)
            metadata.planner_data[f"model.{name}"] = ("model", name)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    manifest.files = {name: FileRecord.of(folder / name) for name in sorted(sizes_in(folder))}
    manifest.write(folder)
