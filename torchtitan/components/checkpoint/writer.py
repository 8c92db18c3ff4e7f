"""Write a checkpoint so that it becomes visible only when complete."""

from __future__ import annotations

import traceback
from typing import Any, cast

from torch.distributed.checkpoint import FileSystemWriter, Metadata, SavePlan, SavePlanner
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.futures import Future
from torch.utils.serialization import config as serialization_config

from torchtitan.components.run_folder import CONFIG_FILE, config_to_keep
from torchtitan.config import JobConfig
from torchtitan.errors import (
    CheckpointError,
    OutageError,
    TitanError,
    outage_or,
)

from .folder import partial_folder
from .manifest import METADATA, Manifest
from .save_planner import LastSave
from .save_table import Places
from .series import CheckpointSeries
from .storage import CheckpointFiles, FileRecord, StoragePath, write_durably


class CheckpointWriter(FileSystemWriter):
    """Writes the partial folder of `step-N` from all ranks; rank 0 then completes it.

    `torch.distributed.checkpoint` calls these methods in this order, also in the background, and
    raises an error of one rank on all. `prepare_global_plan` and `finish` run on rank 0 only. Each
    rank computes its file's checksum while writing, and sends it to rank 0.

    Args:
        series: the checkpoints of the run, to which this one is added.
        manifest: description of the checkpoint; `finish` fills in time and files.
        last: the last save of the same ranks, shared with the planner of this save.
        job_config: the configuration of the run, which is saved too.
    """

    fs: CheckpointFiles
    path: StoragePath

    def __init__(
        self,
        series: CheckpointSeries,
        manifest: Manifest,
        last: LastSave,
        job_config: JobConfig,
    ) -> None:
        folder = series.folder(manifest.step)
        super().__init__(str(folder), sync_files=False)  # `CheckpointFiles` syncs
        self.fs = CheckpointFiles()
        self.path = partial_folder(folder)
        self._series = series
        self._manifest = manifest
        self._job_config = job_config
        self._last = last

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan  # rank 0 creates the folder, below

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self._series.begin(self._manifest.step)
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
        self._series.complete(self._manifest)


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

    An outage may be over when the run is restarted, which then saves again.
    """
    if isinstance(error, OutageError):
        return OutageError(message)
    return outage_or(CheckpointError, message, error)
