"""Creates the output folder of a conversion or an average, completely or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import track

from torchtitan.components.checkpoint.folder import partial_folder
from torchtitan.components.checkpoint.storage import (
    is_there,
    make_folder,
    sync_file,
    sync_folder,
)
from torchtitan.errors import CheckpointError, os_errors_as

T = TypeVar("T")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield `OUT.partial` for files, which becomes `OUT` when they are on disk. Errors delete it.

    Raises:
        CheckpointError: `OUT` exists, or it cannot be written; `OutageError`: not now.
    """
    refuse_existing(out)
    partial = partial_folder(out)
    with os_errors_as(CheckpointError, f"{out} could not be written"):
        make_folder(out.parent)
        partial.mkdir()
        try:
            yield partial
            _refuse(out)
            for file in partial.iterdir():
                sync_file(file)
            sync_folder(partial)
            partial.rename(out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync_folder(out.parent)


def refuse_existing(out: Path) -> None:
    """Raise `CheckpointError` if the folder, or an unfinished one of its name, exists."""
    _refuse(out)
    if is_there(partial_folder(out)):
        raise CheckpointError(
            f"{partial_folder(out)} exists, perhaps left by a command that was interrupted. Delete "
            "it first"
        )


def _refuse(out: Path) -> None:
    if is_there(out):
        raise CheckpointError(f"{out} exists, and nothing is overwritten")


def with_progress(items: Iterable[T], total: int) -> Iterable[T]:
    """Return the items, with a progress bar on stderr if that is a terminal."""
    console = Console(stderr=True)
    return track(items, "writing", total=total, console=console, disable=not console.is_terminal)
