"""Create, list and delete checkpoint folders, each of which appears and disappears as a whole.

checkpoint/
  step-500/               complete: appears by one rename, when all of its files are on disk
    .metadata             location of each tensor (torch.distributed.checkpoint)
    __0_0.distcp, ...     the tensors, one file per rank
    config.resolved.toml  the configuration of the run
    manifest.json         step, model, sizes and checksums of the files above
  step-1000.partial/      being written or deleted, or left by a crash
  step-500.replaced/      an older step-500, until a new one is complete
  step-500.damaged/       set aside when a new step-500 was saved

Remote storage has no such rename. There, files are written directly to `step-1000`, which contains
a file `.partial` until the manifest, the last file, exists. Deletion removes the manifest first. An
older `step-1000` is moved before, by copying it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

from torchtitan.config import JobConfig
from torchtitan.errors import CheckpointError, DamagedCheckpointError, outage_or
from torchtitan.tools.logging import logger
from torchtitan.tools.text import first_line, is_url

from .manifest import MANIFEST, Manifest
from .storage import (
    AT_ONCE,
    P,
    RemotePath,
    StoragePath,
    folders_in,
    is_there,
    make_folder,
    sizes_in,
    storage_path,
    sync_folder,
    write_durably,
)

T = TypeVar("T")

PARTIAL = ".partial"
"""Suffix of an incomplete local folder; in an incomplete remote folder, the name of a file."""
REPLACED = ".replaced"


def checkpoint_root(job_config: JobConfig) -> StoragePath:
    """Return the folder of the run's checkpoints; each replica group has its own.

    Raises:
        ConfigError: URLs of this kind are not supported.
    """
    folder = job_config.checkpoint.folder
    fault_tolerance = job_config.fault_tolerance
    own = fault_tolerance.replica if fault_tolerance.enable else ""
    if is_url(folder):
        return storage_path(f"{folder.rstrip('/')}/{own}".rstrip("/"))
    if Path(folder).is_absolute() and own not in Path(folder).parts:  # else the user's own layout
        return Path(folder, own)
    return Path(job_config.job.dump_folder, folder)  # the dump folder is the group's own


def step_folder(root: P, step: int) -> P:
    return cast(P, root / f"step-{step}")


def step_of(folder: StoragePath) -> int:
    return int(folder.name.removeprefix("step-"))


def list_checkpoints(root: P) -> list[P]:
    """Return the `step-N` folders, good and damaged, in the order of saving.

    They are not sorted by step, since a run that went back to an earlier step then saves newer
    checkpoints than those it left behind. Folders with a damaged manifest come last, so that they
    are not overlooked.
    """
    complete = _complete(_step_folders(root))
    times = dict(zip(complete, _of_each(saved_at, complete), strict=True))
    return sorted(complete, key=lambda path: (not times[path], times[path], step_of(path)))


def _step_folders(root: P) -> list[P]:
    return [path for path in folders_in(root) if re.fullmatch(r"step-\d+", path.name)]


def _complete(folders: list[P]) -> list[P]:
    partial = _of_each(_is_partial, folders)
    return [path for path, is_partial in zip(folders, partial, strict=True) if not is_partial]


def _of_each(look: Callable[[P], T], folders: list[P]) -> list[T]:
    """Look at several folders at once: a remote storage takes its time for each."""
    with ThreadPoolExecutor(AT_ONCE) as threads:
        return [*threads.map(look, folders)]


def saved_at(folder: StoragePath) -> str:
    """Return the time of completion; empty if the manifest is damaged."""
    try:
        return Manifest.read(folder).saved_at
    except DamagedCheckpointError:
        return ""


def was_deleted(folder: StoragePath) -> bool:
    """Return whether a checkpoint that was listed is deleted now, or is being deleted."""
    return not is_there(folder) or _is_partial(folder)


def manifest_if_whole(folder: StoragePath) -> Manifest | None:
    """Return the manifest of a checkpoint; None if file sizes show damage."""
    try:
        return Manifest.read_whole(folder)
    except DamagedCheckpointError:
        return None


def is_resumable(folder: StoragePath) -> bool:
    """Return False for an export, and for a checkpoint whose file sizes show damage."""
    manifest = manifest_if_whole(folder)
    return manifest is not None and not manifest.model_only


def partial_folder(folder: P) -> P:
    """Return the location of the contents of `folder` while it is incomplete."""
    if isinstance(folder, RemotePath):
        return folder
    return cast(P, folder.with_name(f"{folder.name}{PARTIAL}"))


def final_folder(folder: Path) -> Path:
    """Return the final name of a `partial_folder`, for messages."""
    return folder.with_name(folder.name.removesuffix(PARTIAL))


def begin(folder: StoragePath, damaged: Collection[str] = (), known: Collection[str] = ()) -> None:
    """Create an empty `partial_folder(folder)`.

    Deletes the remains of crashed saves, so no other save may be in progress.

    Args:
        damaged: see `commit`.
        known: names of complete checkpoints. To look at another remote folder takes a request.

    Raises:
        OSError: existing files there cannot be deleted.
    """
    restore_replaced(folder.parent)
    own = partial_folder(folder)
    for path in folders_in(folder.parent):
        if not re.match(r"step-\d+", path.name) or path.name in known or not _is_partial(path):
            continue
        if path != own:
            delete_if_possible(path)
            continue
        try:
            delete(path)
        except OSError as error:
            error.filename = str(path)  # `rmtree` gives the file's name without its folder
            raise
    if isinstance(folder, RemotePath):
        _make_way(folder, damaged)
        folder.mkdir()
        write_durably(folder / PARTIAL, b"")
    else:
        make_folder(partial_folder(folder))


def commit(folder: StoragePath, damaged: Collection[str] = ()) -> None:
    """Make the partial folder of `folder`, whose files are on disk, visible under its final name.

    An existing good folder of that name is replaced. A damaged one (by its sizes, or because its
    name is in `damaged`) is kept as `step-N.damaged`.
    """
    if isinstance(folder, RemotePath):
        (folder / PARTIAL).unlink()
        delete_if_possible(folder.with_name(folder.name + REPLACED))
        return
    partial = partial_folder(folder)
    sync_folder(partial)
    _make_way(folder, damaged)
    partial.rename(folder)
    sync_folder(folder.parent)
    with suppress(OSError):  # `restore_replaced` will delete the rest
        rmtree(folder.with_name(folder.name + REPLACED))


def delete(folder: StoragePath) -> None:
    """Delete a checkpoint, or the remains of one, so that it never looks complete meanwhile."""
    if isinstance(folder, RemotePath):
        write_durably(folder / PARTIAL, b"")
        names = sizes_in(folder).keys()
        if MANIFEST in names:
            (folder / MANIFEST).unlink()
        folder.unlink_files(names - {MANIFEST, PARTIAL})
        (folder / PARTIAL).unlink()
        folder.remove()  # the folder itself, if the storage has folders
        return
    if folder.is_symlink():  # do not delete the contents of its target
        folder.unlink()
        return
    partial = folder
    if not folder.name.endswith(PARTIAL):
        partial = partial_folder(folder)
        folder.rename(partial)
        sync_folder(folder.parent)
    rmtree(partial)


def rmtree(folder: Path) -> None:
    """Delete like `shutil.rmtree`, several files in parallel."""
    if not folder.is_symlink():  # do not delete the contents of its target
        with ThreadPoolExecutor(AT_ONCE) as threads, suppress(OSError):
            for path in folder.iterdir():
                threads.submit(os.unlink, path)
    shutil.rmtree(folder)  # delete the rest, or raise its error


def delete_if_possible(folder: StoragePath) -> None:
    """Delete a folder, if it exists; log a warning if it cannot be deleted completely.

    On NFS, files that are being read cannot be deleted; files of another user never can.
    """
    try:
        if is_there(folder):
            delete(folder)
    except Exception as error:  # the storage's package may raise any type
        logger.warning("%s could not be deleted: %s", folder, first_line(error))


def delete_unfinished(folder: StoragePath) -> None:
    """Delete the remains of a failed save of `folder`, but no complete folder of that name."""
    partial = partial_folder(folder)
    if _is_partial(partial):
        delete(partial)


def restore_replaced(root: StoragePath) -> None:
    """Give older checkpoints their names back, unless the new ones are complete.

    Raises:
        CheckpointError: a checkpoint cannot be renamed back.
        OutageError: the same, but perhaps only for now.
    """
    for replaced in folders_in(root):
        if not (replaced.name.startswith("step-") and replaced.name.endswith(REPLACED)):
            continue
        folder = replaced.with_name(replaced.name.removesuffix(REPLACED))
        try:
            if folder.exists() and not _is_partial(folder):
                delete_if_possible(replaced)
                continue
            if isinstance(folder, RemotePath):
                delete(folder)  # the beginning of a new one, or the rest of the older one
            _rename(replaced, folder)
        except OSError as error:
            message = f"{replaced} cannot be renamed to {folder.name}: {first_line(error)}"
            raise outage_or(CheckpointError, message, error) from error


def to_prune(
    root: StoragePath,
    keep: int,
    damaged: Collection[str] = (),
    known: dict[str, str] | None = None,
    keep_every: int = 0,
    keep_steps: Collection[int] = (),
) -> list[StoragePath]:
    """Return the checkpoints to delete: resumable ones except the `keep` saved last.

    None if `keep` is 0. Checkpoints of every `keep_every` steps are kept too, if that is not 0, and
    those of `keep_steps`.

    Exports and damaged checkpoints are neither counted nor deleted, so that a good one is always
    left. A checkpoint is damaged if it is named in `damaged` or, unless it is `known`, by its file
    sizes. Reading all files for their checksums after each save would cost more than it is worth.

    Args:
        known: see `CheckpointSeries`; completed here. So a run does not read the manifests of all
            that it keeps, of which there may be a thousand, after each save.
    """

    def look(folder: StoragePath) -> str | None:
        manifest = manifest_if_whole(folder)
        if manifest is None:
            return None
        return "" if manifest.model_only else manifest.saved_at

    if not keep:
        return []
    known = {} if known is None else known
    found = [path for path in _step_folders(root) if path.name not in damaged]
    unknown = _complete([path for path in found if path.name not in known])
    looked_at = zip(unknown, _of_each(look, unknown), strict=True)
    known |= {path.name: time for path, time in looked_at if time is not None}
    resumable = [path for path in found if known.get(path.name)]
    resumable.sort(key=lambda path: (known[path.name], step_of(path)))
    old = [path for path in resumable[:-keep] if step_of(path) not in keep_steps]
    return [path for path in old if not keep_every or step_of(path) % keep_every]


def _is_partial(folder: StoragePath) -> bool:
    if isinstance(folder, RemotePath):
        names = sizes_in(folder)
        return PARTIAL in names and MANIFEST not in names
    return folder.name.endswith(PARTIAL)


def _make_way(folder: StoragePath, damaged: Collection[str]) -> None:
    """Rename the folder if it exists, to `step-N.damaged` if it is a damaged checkpoint."""
    if not is_there(folder):
        return
    is_checkpoint = re.fullmatch(r"step-\d+", folder.name) is not None
    if is_checkpoint and (folder.name in damaged or manifest_if_whole(folder) is None):
        _set_aside(folder)
    else:
        logger.info("a new %s takes the place of an older one", folder)
        _rename(folder, folder.with_name(folder.name + REPLACED))


def _set_aside(folder: StoragePath) -> None:
    names = [f"{folder.name}.damaged", *(f"{folder.name}.damaged-{i}" for i in range(2, 1000))]
    paths: list[Any] = [folder.with_name(name) for name in names]
    aside = next(path for path in paths if not is_there(path))
    _rename(folder, aside)
    logger.warning("%s is damaged and was renamed to %s", folder, aside.name)


def _rename(folder: StoragePath, target: Any) -> None:
    """Rename a checkpoint; a remote one by copying, with one of the two complete at any time."""
    if not isinstance(folder, RemotePath):
        folder.rename(target)
        return
    target.mkdir()
    write_durably(target / PARTIAL, b"")
    names = sizes_in(folder).keys()
    folder.copy_files(names - {MANIFEST}, target)
    folder.copy_files(names & {MANIFEST}, target)
    (target / PARTIAL).unlink()
    delete(folder)
