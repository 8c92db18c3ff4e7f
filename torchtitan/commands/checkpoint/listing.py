"""Lists, verifies and prunes the checkpoints that a path or URL refers to."""

from __future__ import annotations

import sys
from pathlib import Path

from torchtitan.components.checkpoint.folder import (
    delete,
    list_checkpoints,
    manifest_if_whole,
    to_prune,
    was_deleted,
)
from torchtitan.components.checkpoint.manifest import MANIFEST, METADATA, Manifest, is_hf_weights
from torchtitan.components.checkpoint.reader import read_metadata, read_safetensors_metadata
from torchtitan.components.checkpoint.storage import (
    StoragePath,
    folders_in,
    sizes_in,
    storage_path,
)
from torchtitan.errors import CheckpointError, DamagedCheckpointError, OutageError, outage_or
from torchtitan.tools.foreign_files import is_folder
from torchtitan.tools.tables import print_table
from torchtitan.tools.text import human_bytes, natural_order

_LEFT_OVER = {
    ".partial": "not complete; the next save deletes it",
    ".replaced": "an older one; the next start resolves it",
    ".damaged": "damaged, and renamed",
}


def root_of(path: StoragePath) -> StoragePath | None:
    """Return the folder with the checkpoints of a run: `path`, or `checkpoint` in it."""
    for root in (path, path / "checkpoint"):
        if any(folder.name.startswith("step-") for folder in folders_in(root)):
            return root
    return None


def checkpoints_of(location: str) -> list[StoragePath]:
    """Return the checkpoint at a location (ours or a Hugging Face folder), or those of a run."""
    path = storage_path(location)
    root = root_of(path)
    if root is not None:
        hf = [folder for folder in folders_in(root) if folder.name.endswith("-hf")]
        return list_checkpoints(root) + sorted(hf, key=lambda folder: natural_order(folder.name))
    if isinstance(path, Path) and not is_folder(path, CheckpointError):
        raise CheckpointError(f"{path}: no such folder")
    if MANIFEST in sizes_in(path) or is_hf_weights(path) or path.name.startswith("step-"):
        return [path]
    below = sorted(str(run) for run in folders_in(path) if root_of(run) is not None)
    hint = f". Runs in it: {', '.join(below[:5])}" if below else ""
    raise CheckpointError(
        f"{path} holds no checkpoint: neither step-N folders nor {MANIFEST} nor safetensors files"
        f"{hint}"
    )


def show(location: str) -> None:
    """Print a table of the checkpoints of a run. Only the sizes of files are checked."""
    found = [(folder, _row(folder)) for folder in checkpoints_of(location)]
    rows = [row for folder, row in found if not was_deleted(folder)]  # by the run
    root = root_of(storage_path(location))
    listed = {row[0] for row in rows}
    for folder in sorted(folders_in(root), key=lambda f: natural_order(f.name)) if root else []:
        if folder.name.startswith("step-") and folder.name not in listed:
            states = (text for ending, text in _LEFT_OVER.items() if ending in folder.name)
            state = next(states, _LEFT_OVER[".partial"])
            rows.append([folder.name, "", _size(folder), "", state])
    print_table(["checkpoint", "saved (UTC)", "size", "kind", "state"], rows, left=5)


def _row(folder: StoragePath) -> list[str]:
    if is_hf_weights(folder):
        return [folder.name, "", _size(folder), "Hugging Face", "no checksums"]
    saved = kind = ""
    state = "good, by sizes"
    try:
        manifest = Manifest.read(folder)
        saved = manifest.saved_at[:19].replace("T", " ")
        kind = "model alone" if manifest.model_only else "resumable"
        manifest.check_sizes(folder)
    except DamagedCheckpointError as error:
        state = f"damaged: {error}"
    return [folder.name, saved, _size(folder), kind, state]


def _size(folder: StoragePath) -> str:
    return human_bytes(sum(sizes_in(folder).values()))


def verify(locations: list[str]) -> int:
    """Read all files of checkpoints and compare their checksums. Return 1 if one is damaged."""
    rows, problems = [], []
    for folder in (folder for location in locations for folder in checkpoints_of(location)):
        found = _problems(folder)
        if found and was_deleted(folder):
            sys.stdout.write(f"{folder} was deleted meanwhile\n")
            continue
        problems += found
        files = len(sizes_in(folder))
        kind = "no checksums; structure is intact" if is_hf_weights(folder) else "good"
        state = f"damaged: {len(found)} file{'s' * (len(found) > 1)}" if found else kind
        rows.append([str(folder), str(files), _size(folder), state])
    if not rows:
        raise CheckpointError(f"{', '.join(locations)}: no complete checkpoint")
    print_table(["checkpoint", "files", "size", "state"], rows, left=4)
    for problem in problems:
        sys.stdout.write(f"{problem}\n")
    return 1 if problems else 0


def _problems(folder: StoragePath) -> list[str]:
    try:
        if is_hf_weights(folder):
            assert isinstance(folder, Path)
            read_safetensors_metadata(folder)  # checks the headers against the files' sizes
            return []
        manifest = Manifest.read(folder)
        found = manifest.damaged_files(folder)
        if not any(METADATA in problem for problem in found):
            read_metadata(folder)
        return found
    except (CheckpointError, OutageError) as error:
        return [str(error)]


def prune(location: str, keep: int, keep_every: int, keep_steps: list[int], dry_run: bool) -> None:
    """Delete the resumable checkpoints of a run except the `keep` good ones saved last.

    Those of every `keep_every` steps stay, too, if that is not 0, and those of `keep_steps`.

    The files of the checkpoints that stay are read: one with wrong checksums is not counted.
    """
    root = root_of(storage_path(location))
    if root is None:
        raise CheckpointError(f"{location} holds no step-N folders")
    damaged: set[str] = set()
    good = 0
    for folder in reversed(list_checkpoints(root)):
        manifest = manifest_if_whole(folder)
        to_read = good < keep and manifest is not None and not manifest.model_only
        if manifest is None or (to_read and manifest.damaged_files(folder)):
            damaged.add(folder.name)
        elif to_read:
            good += 1
    old = to_prune(root, keep, damaged, keep_every=keep_every, keep_steps=keep_steps)
    for folder in old:
        size = _size(folder)
        if not dry_run:
            try:
                delete(folder)
            except FileNotFoundError:
                sys.stdout.write(f"{folder} was deleted meanwhile\n")
                continue
            except OSError as error:
                problem = f"{folder} could not be deleted: {error}"
                raise outage_or(CheckpointError, problem, error) from error
        sys.stdout.write(f"{'would delete' if dry_run else 'deleted'} {folder} ({size})\n")
    left = [folder for folder in list_checkpoints(root) if folder not in old]
    names = ", ".join(folder.name for folder in left if folder.name in damaged)
    note = f"; damaged, neither counted nor deleted: {names}" if names else ""
    sys.stdout.write(f"{root}: {len(left)} left{note}\n")
