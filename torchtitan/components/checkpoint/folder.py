"""Checkpoint folders on disk.

checkpoint/
  step-500/             complete: it appears by one rename, when all of its files are on disk
    .metadata           which tensor is where (torch.distributed.checkpoint)
    __0_0.distcp, ...   the tensors, a file a rank
    manifest.json       step, model and the sizes of the files above
  step-1000.partial/    being written or deleted, or left by a crash
  step-500.replaced/    an older step-500, while a new one takes its place
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torchtitan.errors import CheckpointError

MANIFEST = "manifest.json"


@dataclass
class Manifest:
    """What a checkpoint holds."""

    step: int
    """Optimizer steps done."""
    model_only: bool
    """Weights alone: an export, which cannot resume a run."""
    model: dict[str, Any]
    """`name`, `flavor` and `args` (the model's hyperparameters)."""
    saved_at: str = ""
    """Time of completion: UTC, ISO 8601. Sorts as text."""
    files: dict[str, int] = field(default_factory=dict)
    """Name of each file -> its size in bytes."""

    def write(self, folder: Path) -> None:
        """Describe the files in `folder` as they are now."""
        self.saved_at = datetime.now(UTC).isoformat(timespec="microseconds")
        self.files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        with open(folder / MANIFEST, "w") as file:
            json.dump(dataclasses.asdict(self), file, indent=1)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises `CheckpointError` if it is missing or damaged."""
        path = folder / MANIFEST
        try:
            manifest = cls(**json.loads(path.read_text()))
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be read ({error.strerror}): the checkpoint is incomplete or damaged"
            ) from error
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
        return manifest

    def check_files(self, folder: Path) -> None:
        """Raises `CheckpointError` for a file that is missing or has another size than written."""
        for name, size in self.files.items():
            path = folder / name
            if not path.is_file():
                raise CheckpointError(f"{path} is missing: the checkpoint is damaged")
            now = path.stat().st_size
            if now != size:
                raise CheckpointError(
                    f"{path} is damaged: {size} bytes were written, {now} are there"
                )


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def partial_folder(folder: Path) -> Path:
    """Where the contents of `folder` are while it is not complete."""
    return folder.with_name(f"{folder.name}.partial")


def list_checkpoints(root: Path) -> list[Path]:
    """The `step-N` folders, the one saved last at the end.

    The order is that of saving, since a run that went back to an earlier step is newer than what it
    left behind. A damaged manifest counts as new, so that nobody overlooks it.
    """
    folders = [path for path in root.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(folders, key=_order)


def _order(folder: Path) -> tuple[bool, str, int]:
    try:
        return False, Manifest.read(folder).saved_at, step_of(folder)
    except CheckpointError:
        return True, "", step_of(folder)


def commit(folder: Path) -> None:
    """Make the partial folder of `folder` visible under its name, in place of an older one."""
    replaced = folder.with_name(f"{folder.name}.replaced")
    if folder.exists():
        folder.rename(replaced)
    partial_folder(folder).rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def restore_replaced(root: Path) -> None:
    """Finish or undo a `commit` that a crash interrupted."""
    for replaced in root.glob("step-*.replaced"):
        folder = replaced.with_suffix("")
        if folder.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(folder)


def remove_partial(root: Path) -> None:
    """Delete what crashes left. No save may be under way."""
    for partial in root.glob("step-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def prune(root: Path, keep: int, newest: Path) -> None:
    """Delete resumable checkpoints but the `keep` saved last; never `newest`.

    Exports, and folders whose manifest is damaged, are neither counted nor deleted.
    """
    resumable = [path for path in list_checkpoints(root) if is_resumable(path)]
    for folder in resumable[:-keep]:
        if folder != newest:  # which is among the last, unless the clock was set back
            partial = partial_folder(folder)
            folder.rename(partial)  # so that a half-deleted checkpoint never looks complete
            shutil.rmtree(partial)


def is_resumable(folder: Path) -> bool:
    """False for an export and for a folder whose manifest is damaged."""
    try:
        return not Manifest.read(folder).model_only
    except CheckpointError:
        return False
