"""Checkpoint folders, and how they appear and disappear as a whole.

checkpoint/
  step-500/               complete: it appears by one rename, when all of its files are on disk
    .metadata             which tensor is where (torch.distributed.checkpoint)
    __0_0.distcp, ...     the tensors, a file a rank
    config.resolved.toml  the configuration of the run
    manifest.json         step, model, sizes and checksums of the files above
  step-1000.partial/      being written or deleted, or left by a crash
  step-500.replaced/      an older step-500, while a new one takes its place
  step-500.damaged/       set aside when a new step-500 was saved

A remote storage has no such rename. There, files go straight to `step-1000`, which has a file
`.partial` until its manifest, the last file, is there; to delete it, the manifest goes first.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torchtitan.errors import CheckpointError, DamagedCheckpointError, outage_or
from torchtitan.tools.text import first_line

from .manifest import MANIFEST, Manifest, time_after
from .storage import (
    P,
    RemotePath,
    StoragePath,
    folders_in,
    is_url,
    make_folder,
    sizes_in,
    storage_path,
    sync_folder,
    write_durably,
)

if TYPE_CHECKING:
    from torchtitan.config import JobConfig

logger = logging.getLogger("torchtitan")

PARTIAL = ".partial"
"""End of the name of a local folder that is not complete; in a remote folder, a file's name."""
_DELETED_AT_ONCE = 16
"""Files of a folder: a file server takes about a millisecond for each, and there is one a rank."""


def checkpoint_root(job_config: JobConfig) -> StoragePath:
    """The folder of the run's checkpoints; a replica group has its own, wherever that is.

    Raises:
        ConfigError: nothing is known of such URLs.
    """
    folder = job_config.checkpoint.folder
    fault_tolerance = job_config.fault_tolerance
    own = fault_tolerance.replica if fault_tolerance.enable else ""
    if is_url(folder):
        return storage_path(f"{folder.rstrip('/')}/{own}".rstrip("/"))
    if Path(folder).is_absolute() and own not in Path(folder).parts:  # else the user separates them
        return Path(folder, own)
    return Path(job_config.job.dump_folder, folder)  # the group's own


def step_folder(root: P, step: int) -> P:
    return cast(P, root / f"step-{step}")


def step_of(folder: StoragePath) -> int:
    return int(folder.name.removeprefix("step-"))


def list_checkpoints(root: P) -> list[P]:
    """The `step-N` folders, good and damaged ones, the one saved last at the end.

    The order is that of saving, since a run that went back to an earlier step is newer than what it
    left behind. A damaged manifest counts as new, so that nobody overlooks it.
    """
    folders = [path for path in folders_in(root) if re.fullmatch(r"step-\d+", path.name)]
    return sorted((path for path in folders if not _is_partial(path)), key=_order)


def _order(folder: StoragePath) -> tuple[bool, str, int]:
    try:
        return False, Manifest.read(folder).saved_at, step_of(folder)
    except DamagedCheckpointError:
        return True, "", step_of(folder)


class SaveTimes:
    """When a run's checkpoints are complete: each later than all in the folder before.

    Clocks of hosts differ. By that of a host alone, checkpoints of one that was ahead would stay
    the newest, so that each start went back to them, and newer ones were pruned.
    """

    def __init__(self, root: StoragePath) -> None:
        self._root = root
        self._latest: str | None = None
        self.whole: set[str] = set()
        """Times of checkpoints whose files are all there: this run has written or seen them."""

    def now(self) -> str:
        """For a checkpoint that is complete now: its `Manifest.saved_at`."""
        if self._latest is None:  # once: nobody else saves into the folder meanwhile
            newest_first = map(_saved_at, reversed(list_checkpoints(self._root)))
            self._latest = next(filter(None, newest_first), "")
        self._latest = time_after(self._latest)
        self.whole.add(self._latest)
        return self._latest


def _saved_at(folder: StoragePath) -> str:
    """Empty if it is damaged."""
    try:
        return Manifest.read(folder).saved_at
    except DamagedCheckpointError:
        return ""


def damage(folder: StoragePath) -> str:
    """What is wrong with a checkpoint as far as sizes tell; "" if nothing is."""
    try:
        Manifest.read_whole(folder)
    except DamagedCheckpointError as error:
        return str(error)
    return ""


def is_resumable(folder: StoragePath, whole: set[str] | None = None) -> bool:
    """False for an export, and for a checkpoint that is damaged as far as sizes tell.

    `whole`: see `SaveTimes`. Sizes of these are not looked at; another one that is whole is added.
    """
    whole = set() if whole is None else whole
    try:
        manifest = Manifest.read(folder)
        if manifest.saved_at not in whole:
            manifest.check_sizes(folder)
            whole.add(manifest.saved_at)
        return not manifest.model_only
    except DamagedCheckpointError:
        return False


def partial_folder(folder: P) -> P:
    """Where the contents of `folder` are while it is not complete."""
    if isinstance(folder, RemotePath):
        return folder
    return cast(P, folder.with_name(f"{folder.name}{PARTIAL}"))


def final_folder(folder: Path) -> Path:
    """What a `partial_folder` will be called, which is what a message names."""
    return folder.with_name(folder.name.removesuffix(PARTIAL))


def begin(folder: StoragePath, damaged: Collection[str] = ()) -> None:
    """Make room for the files of `folder`: an empty `partial_folder(folder)`.

    What crashes left is deleted, so no other save may be under way. `damaged`: see `commit`.

    Raises:
        OSError: the place is taken by files that cannot be deleted.
    """
    restore_replaced(folder.parent)
    own = partial_folder(folder)
    for path in folders_in(folder.parent):
        if not re.match(r"step-\d+", path.name) or not _is_partial(path):
            continue
        if path != own:
            delete_if_possible(path)
            continue
        try:
            delete(path)
        except OSError as error:
            error.filename = str(path)  # `rmtree` says which file, but not where
            raise
    if isinstance(folder, RemotePath):
        if folder.exists():
            _take_away(folder, damaged)
        folder.mkdir()
        write_durably(folder / PARTIAL, b"")
    else:
        make_folder(partial_folder(folder))


def commit(folder: StoragePath, damaged: Collection[str] = ()) -> None:
    """Make the partial folder of `folder`, whose files are on the disk, visible under its name.

    A good one that has the name is replaced. A damaged one, by its size or since its name is in
    `damaged`, is kept as `step-N.damaged`.
    """
    if isinstance(folder, RemotePath):
        (folder / PARTIAL).unlink()
        return
    partial = partial_folder(folder)
    sync_folder(partial)
    replaced = folder.with_name(f"{folder.name}.replaced")
    if folder.exists():
        if re.fullmatch(r"step-\d+", folder.name) and _is_damaged(folder, damaged):
            _set_aside(folder)
        else:
            logger.info("a new %s takes the place of an older one", folder)
            folder.rename(replaced)
    partial.rename(folder)
    sync_folder(folder.parent)
    rmtree(replaced, ignore_errors=True)


def delete(folder: StoragePath) -> None:
    """Delete a checkpoint, or what is left of one, so that it never looks complete half-way."""
    if isinstance(folder, RemotePath):
        write_durably(folder / PARTIAL, b"")
        names = sizes_in(folder).keys()
        if MANIFEST in names:
            (folder / MANIFEST).unlink()
        folder.unlink_files(names - {MANIFEST, PARTIAL})
        (folder / PARTIAL).unlink()
        folder.remove()  # the folder, where there is such a thing
        return
    if folder.is_symlink():  # to a place that is not ours to clear
        folder.unlink()
        return
    partial = folder
    if not folder.name.endswith(PARTIAL):
        partial = partial_folder(folder)
        folder.rename(partial)
        sync_folder(folder.parent)
    rmtree(partial)


def rmtree(folder: Path, ignore_errors: bool = False) -> None:
    """`shutil.rmtree`, some files at a time."""
    if not folder.is_symlink():  # to a place that is not ours to clear
        with ThreadPoolExecutor(_DELETED_AT_ONCE) as threads, suppress(OSError):
            for path in folder.iterdir():
                threads.submit(os.unlink, path)
    shutil.rmtree(folder, ignore_errors)  # what is left, or its error


def delete_if_possible(folder: StoragePath) -> None:
    """`delete` what is in nobody's way; a warning if it cannot be deleted, or not all of it.

    A file that somebody reads cannot on NFS, and somebody else's never.
    """
    try:
        delete(folder)
    except Exception as error:  # of whatever kind the storage's package has
        logger.warning("%s could not be deleted: %s", folder, first_line(error))


def delete_unfinished(folder: StoragePath) -> None:
    """Delete what a failed save has left of `folder`, but no complete one of that name."""
    partial = partial_folder(folder)
    if _is_partial(partial):
        delete(partial)


def restore_replaced(root: StoragePath) -> None:
    """Finish or undo a `commit` that a crash interrupted.

    Raises:
        CheckpointError: a checkpoint cannot have its name back; `OutageError`: not now.
    """
    if isinstance(root, RemotePath):
        return
    for replaced in root.glob("step-*.replaced"):
        folder = replaced.with_suffix("")
        if folder.exists():
            delete_if_possible(replaced)
            continue
        try:
            replaced.rename(folder)
        except OSError as error:
            message = f"{replaced} cannot be renamed to {folder.name}: {first_line(error)}"
            raise outage_or(CheckpointError, message, error) from error


def to_prune(
    root: StoragePath,
    keep: int,
    damaged: Collection[str] = (),
    whole: set[str] | None = None,
    keep_every: int = 0,
) -> list[StoragePath]:
    """The resumable checkpoints but the `keep` saved last; none if `keep` is 0.

    Nor those of each `keep_every` steps, if that is not 0.

    Exports and damaged checkpoints are not counted, so that a good one is always left. Damage is
    known by sizes, of all but the `whole` (see `is_resumable`), and of those named in `damaged`; to
    read all files after each save, for their checksums, would cost more than it is worth.
    """
    if not keep:
        return []
    found = [path for path in list_checkpoints(root) if path.name not in damaged]
    old = [path for path in found if is_resumable(path, whole)][:-keep]
    return [path for path in old if not keep_every or step_of(path) % keep_every]


def _is_partial(folder: StoragePath) -> bool:
    if isinstance(folder, RemotePath):
        names = sizes_in(folder)
        return PARTIAL in names and MANIFEST not in names
    return folder.name.endswith(PARTIAL)


def _is_damaged(folder: StoragePath, damaged: Collection[str]) -> bool:
    return folder.name in damaged or bool(damage(folder))


def _take_away(folder: RemotePath, damaged: Collection[str]) -> None:
    if _is_damaged(folder, damaged):
        _set_aside(folder)
    else:
        logger.info("a new %s takes the place of an older one", folder)
        delete(folder)


def _set_aside(folder: StoragePath) -> None:
    names = [f"{folder.name}.damaged", *(f"{folder.name}.damaged-{i}" for i in range(2, 1000))]
    paths: list[Any] = [folder.with_name(name) for name in names]
    aside = next(path for path in paths if not path.exists())
    folder.rename(aside)
    logger.warning("%s is damaged and was set aside as %s", folder, aside.name)
