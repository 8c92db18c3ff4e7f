"""Compares two checkpoints: configuration, and names, shapes, dtypes and values of tensors."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from torchtitan.components.checkpoint.manifest import (
    METADATA,
    Manifest,
    is_hf_weights,
)
from torchtitan.components.checkpoint.reader import (
    read_metadata,
    read_safetensors_metadata,
    read_whole,
)
from torchtitan.components.checkpoint.saved_tensors import SavedTensor
from torchtitan.components.checkpoint.storage import storage_path
from torchtitan.components.run_folder import CONFIG_FILE
from torchtitan.errors import CheckpointError
from torchtitan.tools.differences import nested_differences
from torchtitan.tools.foreign_files import read_json_if_any
from torchtitan.tools.tables import print_table
from torchtitan.tools.text import natural_order

PIECE = 1 << 22
"""Elements of a tensor that are compared at once."""

Read = Callable[[int, torch.Tensor], None]
"""Fills a flat tensor with the elements from a given index on."""


class Side:
    """A checkpoint of ours or a Hugging Face folder, whose tensors are read in pieces."""

    def __init__(self, location: str) -> None:
        self.folder = storage_path(location)
        self.is_hf = is_hf_weights(self.folder)
        self.fields: dict[str, Any] = {}
        if self.is_hf:
            assert isinstance(self.folder, Path)
            self.metadata: Metadata = read_safetensors_metadata(self.folder)
            self.fields = {"config": read_json_if_any(self.folder / "config.json", CheckpointError)}
            return
        self.manifest = manifest = Manifest.read_whole(self.folder)
        manifest.check_contents(self.folder, manifest.files.keys() & {METADATA, CONFIG_FILE})
        self.metadata = read_metadata(self.folder)
        of_manifest = dataclasses.asdict(manifest)
        self.fields = {name: of_manifest[name] for name in ("step", "model_only", "model")}
        if config := manifest.read_config(self.folder):
            self.fields["config"] = config

    @property
    def entries(self) -> dict[str, Any]:
        return self.metadata.state_dict_metadata

    def reader(self, key: str) -> Read:
        """Return a reader.

        It uses no memory, except for a tensor whose parts are no element ranges: the whole tensor.
        """
        if isinstance(self.folder, Path) and self.is_hf:
            return SavedTensor.in_safetensors(self.folder, self.metadata, key).read
        saved = SavedTensor.find(self.folder, self.metadata, key)
        if saved is not None:
            return saved.read
        whole = read_whole(self.folder, self.metadata, [key])[key].view(-1)

        def read(start: int, out: torch.Tensor) -> None:
            out.copy_(whole[start : start + len(out)])

        return read

    @cached_property
    def plain_values(self) -> dict[str, Any]:
        """Values that are not tensors, by key."""
        tensors = {k for k, of in self.entries.items() if isinstance(of, TensorStorageMetadata)}
        return read_whole(self.folder, self.metadata, self.entries.keys() - tensors)


def diff(first: str, second: str) -> int:
    """Print the differences of two checkpoints. Return 0 if there are none, else 1."""
    a, b = Side(first), Side(second)
    if a.is_hf != b.is_hf:
        ours, hf = (b, a) if a.is_hf else (a, b)
        raise CheckpointError(
            f"{hf.folder} is a Hugging Face folder, whose tensor names differ from those of "
            f"{ours.folder}. First convert it: torchtitan convert from-hf {hf.folder} OUT"
        )
    fields = list(nested_differences(a.fields, b.fields))
    if fields:
        rows = [[name, _text(was), _text(now)] for name, was, now in fields]
        print_table(["field", str(a.folder), str(b.folder)], rows, left=3)
    rows = _only_in_one(a, b)
    in_both = sorted(a.entries.keys() & b.entries.keys(), key=natural_order)
    changed = [[key, *row] for key in in_both if (row := _compare(key, a, b))]
    rows += changed
    if rows:
        print_table(["tensor", "difference", "absolute", "relative"], rows, left=2)
    equal = len(in_both) - len(changed)
    differ = len(a.entries.keys() | b.entries.keys()) - equal
    sys.stdout.write(f"{equal} entries are equal, {differ} differ; fields: {len(fields)} differ\n")
    return 1 if rows or fields else 0


def _only_in_one(a: Side, b: Side) -> list[list[str]]:
    """Return a row for each entry, or whole part such as the optimizer, that one of them lacks."""
    rows = []
    for side, other in ((a, b), (b, a)):
        parts = {key.partition(".")[0] for key in other.entries}
        groups: dict[str, list[str]] = {}
        for key in sorted(side.entries.keys() - other.entries.keys(), key=natural_order):
            part = key.partition(".")[0]
            groups.setdefault(key if part in parts else f"{part}.*", []).append(key)
        for group, keys in groups.items():
            name = keys[0] if len(keys) == 1 else f"{group} ({len(keys)} entries)"
            rows.append([name, f"only in {side.folder}", "", ""])
    return rows


def _compare(key: str, a: Side, b: Side) -> list[str] | None:
    """Return the cells of a row after the name; None if there is no difference."""
    x, y = a.entries[key], b.entries[key]
    tensors = [isinstance(entry, TensorStorageMetadata) for entry in (x, y)]
    if not any(tensors):
        was, now = a.plain_values[key], b.plain_values[key]
        return None if was == now else [f"{_text(was)} and {_text(now)}", "", ""]
    if not all(tensors):
        return ["a tensor and a plain value", "", ""]
    if x.size != y.size:
        return [f"shapes {list(x.size)} and {list(y.size)}", "", ""]
    dtypes = x.properties.dtype, y.properties.dtype
    difference, largest = compare_values(a.reader(key), b.reader(key), x.size.numel(), dtypes)
    other_dtype = dtypes[0] != dtypes[1]
    if not difference and not other_dtype:
        return None
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    what = f"dtypes {names[0]} and {names[1]}" if other_dtype else "values"
    relative = difference and (difference / largest if largest else math.inf)
    return [what, f"{difference:.3g}", f"{relative:.3g}"]


def compare_values(
    read_a: Read, read_b: Read, count: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> tuple[float, float]:
    """Compare `count` elements, `PIECE` at a time. NaN equals NaN.

    Returns:
        The largest absolute difference, infinity if only one of two numbers is NaN, and the largest
        absolute value in the first tensor.
    """
    difference = value = 0.0
    wide = torch.int64  # exact, also beyond 2**53
    if any(dtype.is_floating_point for dtype in dtypes):
        wide = torch.float64
    if any(dtype.is_complex for dtype in dtypes):
        wide = torch.complex128
    for start in range(0, count, PIECE):
        size = min(PIECE, count - start)
        x, y = (torch.empty(size, dtype=dtype) for dtype in dtypes)
        read_a(start, x)
        read_b(start, y)
        x, y = x.to(wide), y.to(wide)
        gap = (x - y).abs()
        gap[(x == y) | (x.isnan() & y.isnan())] = 0  # also for infinities
        difference = max(difference, gap.nan_to_num(math.inf, posinf=math.inf).max().item())
        value = max(value, x.abs().nan_to_num(0.0, posinf=math.inf).max().item())
    return difference, value


def _text(value: Any) -> str:
    text = "(none)" if value is None else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
