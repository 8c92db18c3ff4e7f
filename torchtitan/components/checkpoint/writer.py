"""Writes a checkpoint so that it is visible only when complete."""

from __future__ import annotations

import logging
import pickle
import traceback
from collections.abc import Collection
from typing import Any, cast

from torch.distributed.checkpoint import FileSystemWriter, Metadata, SavePlan, SavePlanner
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.futures import Future
from torch.utils.serialization import config as serialization_config

from torchtitan.errors import (
    CheckpointError,
    OutageError,
    TitanError,
    disk_is_full,
    outage_or,
)
from torchtitan.tools.run_folder import CONFIG_FILE

from . import folder as folders
from .manifest import Manifest
from .owner import Claim
from .save_planner import LastSave
from .storage import CheckpointFiles, FileRecord, StoragePath, write_durably

logger = logging.getLogger("torchtitan")

METADATA = ".metadata"


class CheckpointWriter(FileSystemWriter):
    """Ranks write into the partial folder of `step-N`; rank 0 completes it after all have finished.

    `torch.distributed.checkpoint` calls these methods in this order, also in the background, and
    raises an error of one rank on all. `prepare_global_plan` and `finish` run on rank 0 alone.
    Each rank tells rank 0 the checksum of its file, made while it was written.

    Args:
        folder: the `step-N` folder to create.
        manifest: what is saved; `finish` fills in time and files.
        claim: on the folder that `folder` is in.
        times: of what is saved there.
        last: of the same ranks, and of the planner of this save.
        config: text of the file `config.resolved.toml`.
        keep_latest: checkpoints to leave after this one was added; 0 leaves all.
        damaged: names of checkpoints that are known to be damaged.
    """

    fs: CheckpointFiles
    path: StoragePath

    def __init__(
        self,
        folder: StoragePath,
        manifest: Manifest,
        claim: Claim,
        times: folders.SaveTimes,
        last: LastSave,
        config: str,
        keep_latest: int,
        keep_every: int,
        damaged: Collection[str],
    ) -> None:
        super().__init__(str(folder), sync_files=False)  # `CheckpointFiles` syncs
        self.fs = CheckpointFiles()
        self.path = folders.partial_folder(folder)
        self._folder = folder
        self._manifest = manifest
        self._config = config
        self._keep_latest, self._keep_every = keep_latest, keep_every
        self._damaged = damaged
        self._claim = claim
        self._times = times
        self._last = last

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan  # rank 0 makes the folder, below

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self._claim.check()
        folders.begin(self._folder, self._damaged)
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[Any]]:
        """Where each item was written, if rank 0 does not know, and the records of the files."""
        try:
            # PyTorch's own checksums, slower and of the same bytes, would be checked by nobody.
            with cast(Any, serialization_config).patch("save.compute_crc32", False):
                results = super().write_data(plan, planner).value()
        except Exception as error:
            raise cause_of_failed_write(error) from None
        known = self._last.repeated and results == self._last.results
        self._last.results = results
        done: Future[list[Any]] = Future()
        done.set_result([*([] if known else results), self.fs.records])
        return done

    def storage_meta(self) -> StorageMeta:
        # The default records the folder, as a Path, whose pickled form depends on Python's version.
        return StorageMeta(save_id=self.save_id)

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        files: dict[str, FileRecord] = {}
        for *_, records in results:
            files |= records
        told = {item.index: item.storage_data for *items, _ in results for item in items}
        last = self._last
        if told or not last.repeated:
            saved = pickle.loads(last.metadata) if last.repeated else metadata
            saved.storage_data = {**(saved.storage_data or {}), **told}
            saved.storage_meta, saved.version = self.storage_meta(), CURRENT_DCP_VERSION
            last.metadata = pickle.dumps(saved)
        # It is sent to all ranks, which have no use for it.
        metadata.state_dict_metadata, metadata.storage_data, metadata.planner_data = {}, None, None
        files[METADATA] = write_durably(self.path / METADATA, last.metadata)
        files[CONFIG_FILE] = write_durably(self.path / CONFIG_FILE, self._config.encode())
        self._manifest.files = dict(sorted(files.items()))
        self._claim.check()
        self._manifest.saved_at = self._times.now()
        self._manifest.write(self.path)
        folders.commit(self._folder, self._damaged)
        logger.info("saved %s", self._folder)
        self._prune()

    def _prune(self) -> None:
        """The new checkpoint is complete, whatever happens here.

        Other ranks wait meanwhile, but in the group of saves, which has patience; if rank 0 did
        this afterwards they would wait for it in a step of training.
        """
        try:
            found = folders.to_prune(
                self._folder.parent,
                self._keep_latest,
                self._damaged,
                self._times.whole,
                self._keep_every,
            )
        except Exception as error:
            logger.warning("it is not known which old checkpoints to delete: %s", error)
            return
        for old in found:
            if old.name != self._folder.name:  # it is the last of them, or something is wrong
                folders.delete_if_possible(old)


def cause_of_failed_write(error: Exception) -> Exception:
    """What PyTorch's serialization hides behind an error of its own, such as a full disk."""
    hidden = error.__context__
    # The frames hold views of buffers, which CPython (3.12.1, say) crashes on when its garbage
    # collector frees them.
    for failed in filter(None, (error, hidden)):
        traceback.clear_frames(failed.__traceback__)
    return hidden if isinstance(hidden, OSError) else error


def error_of_failed_save(message: str, error: Exception) -> TitanError:
    """What ends a run whose last save has failed with `error`.

    An outage may be over when the run is started again, to save once more. A full disk is no
    outage here: somebody has to make room, and until then each start would train for nothing.
    """
    if isinstance(error, OutageError):
        return OutageError(message)
    if disk_is_full(error):
        return CheckpointError(message)
    return outage_or(CheckpointError, message, error)
