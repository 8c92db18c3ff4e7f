"""Inspects a checkpoint: names, shapes, dtypes and sizes."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from torchtitan.components.checkpoint.load import is_huggingface
from torchtitan.components.checkpoint.manifest import METADATA, Manifest
from torchtitan.components.checkpoint.reader import read_metadata, read_safetensors_metadata
from torchtitan.errors import CheckpointError
from torchtitan.models.which_model import model_of_checkpoint, model_of_hf_folder
from torchtitan.tools.foreign_files import is_file
from torchtitan.tools.tables import print_table
from torchtitan.tools.text import human_bytes, natural_order


def show(folder: Path) -> None:
    """Print the contents of a checkpoint of ours or a Hugging Face folder; no tensor is read."""
    kind, model, metadata = _contents(folder)
    files: dict[str, set[str]] = {}
    for index, at in metadata.storage_data.items():
        files.setdefault(index.fqn, set()).add(at.relative_path)
    entries: dict[str, Any] = metadata.state_dict_metadata
    rows, elements, size = [], 0, 0
    for name in sorted(entries, key=natural_order):
        of = sorted(files.get(name, ()))
        where = of[0] if len(of) == 1 else f"{len(of)} files"
        entry = entries[name]
        if not isinstance(entry, TensorStorageMetadata):
            rows.append([name, "", "plain value", where, ""])
            continue
        count = math.prod(entry.size)
        nbytes = count * entry.properties.dtype.itemsize
        elements, size = elements + count, size + nbytes
        dtype = str(entry.properties.dtype).removeprefix("torch.")
        rows.append([name, str(list(entry.size)), dtype, where, human_bytes(nbytes)])
    if rows:
        print_table(["name", "shape", "dtype", "file", "size"], rows, left=4)
    sys.stdout.write(
        f"{folder}: {kind}\nmodel: {model}\n"
        f"{len(rows)} entries, {elements:,} elements, {human_bytes(size)}\n"
    )


def _contents(folder: Path) -> tuple[str, str, Metadata]:
    """Return the kind of folder, its model, and its metadata."""
    if is_huggingface(folder):
        return "Hugging Face", _hf_model(folder), read_safetensors_metadata(folder)
    manifest = Manifest.read_whole(folder)
    manifest.check_contents(folder, manifest.files.keys() & {METADATA})
    content = "model alone" if manifest.model_only else "resumable"
    kind = f"torchtitan checkpoint, step {manifest.step}, {content}"
    return kind, _our_model(folder, manifest), read_metadata(folder)


def _hf_model(folder: Path) -> str:
    if not is_file(folder / "config.json", CheckpointError):
        return "unknown (no config.json)"
    try:
        return str(model_of_hf_folder(folder))
    except CheckpointError as error:
        return f"unknown ({error})"


def _our_model(folder: Path, manifest: Manifest) -> str:
    try:
        return str(model_of_checkpoint(folder))
    except CheckpointError:
        return f"{manifest.model.get('name')} {manifest.model.get('flavor')} (not registered here)"
