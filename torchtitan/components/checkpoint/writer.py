"""Writes a checkpoint so that it is visible only when complete."""

from __future__ import annotations

import logging
import traceback
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemWriter, Metadata, SavePlan, SavePlanner
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from . import folder as folders
from .folder import Manifest

logger = logging.getLogger("torchtitan")


class CheckpointWriter(FileSystemWriter):
    """Ranks write into `step-N.partial`; rank 0 renames it to `step-N` after all have finished.

    `torch.distributed.checkpoint` calls these methods in this order, also in the background, and
    raises an error of one rank on all. `prepare_global_plan` and `finish` run on rank 0 alone.

    Args:
        folder: the `step-N` folder to create.
        manifest: what is saved; `finish` fills in time and files.
        keep_latest: checkpoints to leave after this one was added; 0 leaves all.
    """

    def __init__(self, folder: Path, manifest: Manifest, keep_latest: int) -> None:
        super().__init__(folders.partial_folder(folder))
        self._folder = folder
        self._manifest = manifest
        self._keep_latest = keep_latest

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan  # rank 0 makes the folder, below

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        root = self._folder.parent
        folders.restore_replaced(root)
        folders.remove_partial(root)
        self.path.mkdir(parents=True)
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            raise cause_of_failed_write(error) from None

    def storage_meta(self) -> StorageMeta:
        # The default records the folder, as a Path, whose pickled form depends on Python's version.
        return StorageMeta(save_id=self.save_id)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> Any:
        super().finish(metadata, results)
        self._manifest.write(self.path)
        folders.commit(self._folder)
        logger.info("saved %s", self._folder)
        if self._keep_latest:
            try:
                folders.prune(self._folder.parent, self._keep_latest, newest=self._folder)
            except OSError as error:
                logger.warning("an old checkpoint could not be deleted: %s", error)


def cause_of_failed_write(error: Exception) -> Exception:
    """What PyTorch's serialization hides behind an error of its own, such as a full disk."""
    hidden = error.__context__
    # The frames hold views of buffers, which CPython (3.12.1, say) crashes on when its garbage
    # collector frees them.
    for failed in filter(None, (error, hidden)):
        traceback.clear_frames(failed.__traceback__)
    return hidden if isinstance(hidden, OSError) else error
