"""Write a checkpoint so that it becomes visible only when complete."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, cast

from torch.distributed.checkpoint import FileSystemWriter, Metadata, SavePlan, SavePlanner
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.futures import Future
from torch.utils.serialization import config as serialization_config

from torchtitan.components.run_folder import CONFIG_FILE, config_to_keep
from torchtitan.errors import (
    CheckpointError,
    OutageError,
    TitanError,
    disk_is_full,
    outage_or,
)

from . import folder as folders
from .manifest import Manifest
from .owner import Claim
from .save_planner import LastSave
from .save_table import Places
from .storage import CheckpointFiles, FileRecord, StoragePath, write_durably

if TYPE_CHECKING:
    from torchtitan.config import JobConfig

logger = logging.getLogger("torchtitan")

METADATA = ".metadata"


class CheckpointWriter(FileSystemWriter):
    """Writes the partial folder of `step-N` from all ranks; rank 0 then completes it.

    `torch.distributed.checkpoint` calls these methods in this order, also in the background, and
    raises an error of one rank on all. `prepare_global_plan` and `finish` run on rank 0 only. Each
    rank computes its file's checksum while writing, and sends it to rank 0.

    Args:
        folder: the `step-N` folder to create.
        manifest: description of the checkpoint; `finish` fills in time and files.
        claim: claim on the parent of `folder`.
        times: completion times of checkpoints in that parent.
        last: the last save of the same ranks, shared with the planner of this save.
        job_config: the configuration of the run, which is saved too.
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
        job_config: JobConfig,
        damaged: Collection[str],
    ) -> None:
        super().__init__(str(folder), sync_files=False)  # `CheckpointFiles` syncs
        self.fs = CheckpointFiles()
        self.path = folders.partial_folder(folder)
        self._folder = folder
        self._manifest = manifest
        self._job_config = job_config
        self._damaged = damaged
        self._claim = claim
        self._times = times
        self._last = last

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan  # rank 0 creates the folder, below

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self._claim.check()
        self._times.known.pop(self._folder.name, None)  # of an older one, in whose place this comes
        folders.begin(self._folder, self._damaged)
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[Any]]:
        """Return where the items are, unless rank 0 knows it already, and the file records."""
        try:
            # PyTorch's own checksums cover the same bytes, are slower, and nothing checks them.
            with cast(Any, serialization_config).patch("save.compute_crc32", False):
                results = super().write_data(plan, planner).value()
        except Exception as error:
            raise cause_of_failed_write(error) from None
        places = Places.of(plan.items, results)
        known = self._last.repeated and places == self._last.places
        self._last.places = places
        done: Future[list[Any]] = Future()
        done.set_result([*([] if known else [places]), self.fs.records])
        return done

    def storage_meta(self) -> StorageMeta:
        # The default includes the folder as a Path, whose pickle depends on the Python version.
        return StorageMeta(save_id=self.save_id)

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        files: dict[str, FileRecord] = {}
        for *_, records in results:
            files |= records
        told = {rank: places[0] for rank, (*places, _) in enumerate(results) if places}
        last = self._last
        if told:  # as by all ranks, unless the last save is repeated
            last.places_of_all |= told
            assert last.table is not None
            meta, version = self.storage_meta(), CURRENT_DCP_VERSION
            last.metadata = last.table.metadata(last.places_of_all, meta, version)
        files[METADATA] = write_durably(self.path / METADATA, last.metadata)
        config = config_to_keep(self._job_config).encode()
        files[CONFIG_FILE] = write_durably(self.path / CONFIG_FILE, config)
        self._manifest.files = dict(sorted(files.items()))
        self._claim.check()
        self._manifest.saved_at = self._times.now()
        self._manifest.write(self.path)
        folders.commit(self._folder, self._damaged)
        is_export = self._manifest.model_only
        self._times.known[self._folder.name] = "" if is_export else self._manifest.saved_at
        logger.info("saved %s", self._folder)
        self._prune()

    def _prune(self) -> None:
        """Delete old checkpoints. The new one is complete, whatever happens here.

        Meanwhile the other ranks wait in the group for saves, which has a long timeout. If rank 0
        pruned later, they would wait for it in a training step.
        """
        config = self._job_config.checkpoint
        try:
            found = folders.to_prune(
                self._folder.parent,
                config.keep_latest_k,
                self._damaged,
                self._times.known,
                config.keep_every,
                config.keep_steps,
            )
        except Exception as error:
            logger.warning("old checkpoints cannot be listed for deletion: %s", error)
            return
        for old in found:
            if old.name != self._folder.name:  # the new one is the newest, or something is wrong
                folders.delete_if_possible(old)


def cause_of_failed_write(error: Exception) -> Exception:
    """Return the error that PyTorch's serialization hides behind its own, such as a full disk."""
    hidden = error.__context__
    # The frames hold views of buffers; CPython (3.12.1, for example) crashes when its garbage
    # collector frees these.
    for failed in filter(None, (error, hidden)):
        traceback.clear_frames(failed.__traceback__)
    return hidden if isinstance(hidden, OSError) else error


def error_of_failed_save(message: str, error: Exception) -> TitanError:
    """Return the error that ends a run whose last save has failed with `error`.

    An outage may be over when the run is restarted, which then saves again. A full disk does not
    count as an outage here: somebody must free space, and until then each restart would train for
    nothing.
    """
    if isinstance(error, OutageError):
        return OutageError(message)
    if disk_is_full(error):
        return CheckpointError(message)
    return outage_or(CheckpointError, message, error)
