"""Finds the checkpoints that a path or URL refers to."""

from __future__ import annotations

from pathlib import Path

from torchtitan.components.checkpoint.folder import list_checkpoints
from torchtitan.components.checkpoint.manifest import MANIFEST
from torchtitan.components.checkpoint.safetensors_files import is_hf_weights
from torchtitan.components.checkpoint.storage import StoragePath, folders_in, storage_path
from torchtitan.errors import CheckpointError


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
        return list_checkpoints(root) + sorted(hf, key=str)
    if (path / MANIFEST).is_file() or is_hf_weights(path) or path.name.startswith("step-"):
        if isinstance(path, Path) and not path.is_dir():
            raise CheckpointError(f"{path} is not a folder")
        return [path]
    below = sorted(str(run) for run in folders_in(path) if root_of(run) is not None)
    hint = f". Runs in it: {', '.join(below[:5])}" if below else ""
    raise CheckpointError(
        f"{path} holds no checkpoint: neither step-N folders nor {MANIFEST} nor safetensors files"
        f"{hint}"
    )
