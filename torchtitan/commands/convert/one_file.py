"""Writes a checkpoint of the model alone into one file, with one tensor in memory at a time."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from torchtitan.components.checkpoint.manifest import METADATA, Manifest
from torchtitan.components.checkpoint.reader import add_whole_tensor
from torchtitan.components.checkpoint.storage import FileRecord, sizes_in
from torchtitan.components.checkpoint.writer import cause_of_failed_write

from .output import with_progress

FILE = "__0_0.distcp"

WriteTensor = Callable[[str, BinaryIO], None]
"""Appends the tensor of a name to a file, in the format of `torch.save`."""


def save_one_by_one(
    folder: Path, manifest: Manifest, planned: dict[str, torch.Tensor], write: WriteTensor
) -> None:
    """Write a checkpoint.

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
