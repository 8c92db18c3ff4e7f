"""Writes a checkpoint of the model alone into one file, with one tensor in memory at a time."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter, Metadata, SavePlan, SavePlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from torchtitan.components.checkpoint.manifest import Manifest, records_of
from torchtitan.components.checkpoint.reader import first_failure
from torchtitan.components.checkpoint.writer import cause_of_failed_write

from .output import with_progress

FILE = "__0_0.distcp"

WriteTensor = Callable[[str, BinaryIO], None]
"""Appends the tensor of a name to a file, in the format of `torch.save`."""


def save_one_by_one(
    folder: Path, manifest: Manifest, planned: dict[str, torch.Tensor], write: WriteTensor
) -> None:
    """Write a checkpoint.

    Args:
        folder: an empty one, or with further files of the checkpoint.
        manifest: without the files, which are added.
        planned: name -> a meta tensor of its shape and dtype.
    """
    writer = _Writer(folder, manifest, write)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.save({"model": planned}, storage_writer=writer, no_dist=True)
        except CheckpointException as failure:
            raise first_failure(failure) from failure


class _Writer(FileSystemWriter):
    """Writes tensors into one file, and keeps none of them.

    PyTorch's own writers keep all tensors of a file until it is complete.
    """

    path: Path

    def __init__(self, folder: Path, manifest: Manifest, write: WriteTensor) -> None:
        super().__init__(folder)
        self._manifest = manifest
        self._write = write

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        with open(self.path / FILE, "w+b") as file:
            for item in with_progress(plan.items, len(plan.items)):
                start = file.tell()
                try:
                    self._write(item.index.fqn.removeprefix("model."), file)
                except Exception as error:
                    raise cause_of_failed_write(error) from None
                length = file.tell() - start
                results.append(WriteResult(item.index, length, _StorageInfo(FILE, start, length)))
            file.flush()
            os.fsync(file.fileno())
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(save_id=self.save_id)  # omits the folder, which is renamed later

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        self._manifest.files = records_of(self.path)
        self._manifest.write(self.path)
