"""The checkpoints of one run: those that it has saved, found damaged, or can go back to."""

from __future__ import annotations

import torch.distributed as dist

from torchtitan.config import JobConfig
from torchtitan.runtime.process_group import job_store
from torchtitan.tools.logging import logger

from . import folder as folders
from .manifest import Manifest, time_after
from .owner import Claim
from .storage import StoragePath


class CheckpointSeries:
    """What a run knows of the folder of its checkpoints.

    All ranks know the same `damaged` and `lineage`. Rank 0 alone accesses the storage.
    """

    def __init__(self, job_config: JobConfig) -> None:
        self.root = folders.checkpoint_root(job_config)
        self.claim = Claim(self.root, job_store() if dist.get_rank() == 0 else None)
        self.damaged: set[str] = set()
        """Names of checkpoints that were found to be damaged."""
        self.lineage: list[StoragePath] = []
        """Checkpoints that this run resumed from or saved, and can roll back to."""
        self._config = job_config.checkpoint
        self._known: dict[str, str] = {}
        """Name -> `Manifest.saved_at`, or "" for an export, of the checkpoints that this run has
        written, or whose files it has found complete."""
        self._latest: str | None = None

    def folder(self, step: int) -> StoragePath:
        return folders.step_folder(self.root, step)

    def go_on_from(self, folder: StoragePath) -> None:
        """Add a checkpoint that the run has saved, or resumes from."""
        self.damaged.discard(folder.name)
        left = {folder.name, *self.damaged}
        self.lineage = [path for path in self.lineage if path.name not in left] + [folder]

    def begin(self, step: int) -> None:
        """Create the partial folder of a checkpoint. Raises the errors of `Claim.check`."""
        self.claim.check()
        folder = self.folder(step)
        self._known.pop(folder.name, None)  # of an older one, in whose place this comes
        folders.begin(folder, self.damaged, self._known)

    def complete(self, manifest: Manifest) -> None:
        """Complete a checkpoint, all of whose other files are on disk, and delete old ones.

        Raises the errors of `Claim.check`.
        """
        self.claim.check()
        folder = self.folder(manifest.step)
        manifest.saved_at = self._time()
        manifest.write(folders.partial_folder(folder))
        folders.commit(folder, self.damaged)
        self._known[folder.name] = "" if manifest.model_only else manifest.saved_at
        logger.info("saved %s", folder)
        self._prune(folder)

    def _time(self) -> str:
        """Return `Manifest.saved_at` for now, but later than that of all checkpoints there.

        Host clocks differ. With the host's clock alone, checkpoints of a host that was ahead would
        stay the newest: each start would go back to them, and newer ones would be pruned.
        """
        if self._latest is None:  # list once: no other run saves into the folder meanwhile
            newest_first = map(folders.saved_at, reversed(folders.list_checkpoints(self.root)))
            self._latest = next(filter(None, newest_first), "")
        self._latest = time_after(self._latest)
        return self._latest

    def _prune(self, new: StoragePath) -> None:
        """Delete old checkpoints. The new one is complete, whatever happens here.

        Meanwhile the other ranks wait in the group for saves, which has a long timeout. If rank 0
        pruned later, they would wait for it in a training step.
        """
        config = self._config
        try:
            found = folders.to_prune(
                self.root,
                config.keep_latest_k,
                self.damaged,
                self._known,
                config.keep_every,
                config.keep_steps,
            )
        except Exception as error:
            logger.warning("old checkpoints cannot be listed for deletion: %s", error)
            return
        for old in found:
            if old != new:  # the new one is the newest, or something is wrong
                folders.delete_if_possible(old)
