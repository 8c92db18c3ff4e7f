"""Read and write `manifest.json`, which describes a checkpoint and reveals damage.

It is written last, and has the size and checksum of each other file, and its own checksum.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

from torchtitan.components.run_folder import CONFIG_FILE
from torchtitan.errors import CheckpointError, DamagedCheckpointError
from torchtitan.tools.foreign_files import is_file, parse_json
from torchtitan.tools.secrets import hide_secrets
from torchtitan.tools.text import first_line

from .retry import if_deleted, parse_again, read_again
from .safetensors_files import SAFETENSORS_FILE, SAFETENSORS_INDEX, weights_files
from .storage import AT_ONCE, FileRecord, StoragePath, sizes_in, write_durably

MANIFEST = "manifest.json"
METADATA = ".metadata"
"""Location of each tensor (torch.distributed.checkpoint)."""

_NO_CHECKSUM = {"crc32": "00000000"}


def _as_text(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, indent=1).encode() + b"\n"


def is_hf_weights(folder: StoragePath) -> TypeGuard[Path]:
    """Return whether a folder holds Hugging Face weights. Remote folders are always our own, and
    so are those with a manifest, whatever else is in them.
    """
    return (
        isinstance(folder, Path)
        and not is_file(folder / MANIFEST, CheckpointError)
        and any(is_file(file, CheckpointError) for file in weights_files(folder))
    )


def no_checkpoint(folder: StoragePath) -> DamagedCheckpointError:
    """Return the error to raise for a folder that has no manifest."""
    if isinstance(folder, Path):
        if folder.is_symlink() and not folder.exists():
            return DamagedCheckpointError(
                f"{folder} is a link to {folder.readlink()}, which does not exist"
            )
        if not folder.exists():
            return DamagedCheckpointError(f"{folder}: no such folder")
        inside = [*folder.glob("step-*/" + MANIFEST), *folder.glob("*/step-*/" + MANIFEST)]
        if inside:
            newest = max(inside, key=lambda path: path.stat().st_mtime).parent
            return DamagedCheckpointError(
                f"{folder} is the folder of a run. Give one of its checkpoints: {newest}"
            )
    return DamagedCheckpointError(
        f"{folder} is not a checkpoint: there is neither {folder / MANIFEST} (complete torchtitan "
        f"checkpoint; for upstream's see docs/migrating.md) nor {SAFETENSORS_FILE} or "
        f"{SAFETENSORS_INDEX} (Hugging Face)"
    )


@dataclass
class Manifest:
    """Description of a checkpoint."""

    step: int
    """Optimizer steps done."""
    model_only: bool
    """Whether it holds weights alone: an export, from which a run cannot resume."""
    model: dict[str, Any]
    """`name`, `flavor`, `args` (the model's hyperparameters) and the tokenizer, see
    `model_identity.describe_model`."""
    data: dict[str, Any] = field(default_factory=dict)
    """`has_conversations` and, except in exports, `sources`, see `DataLoader.describe`. A
    loader of one's own may tell neither."""
    saved_at: str = ""
    """Time of completion: UTC, ISO 8601, sortable as text. See `series.CheckpointSeries`."""
    files: dict[str, FileRecord] = field(default_factory=dict)
    """Name of each other file -> its size and checksum."""

    def write(self, folder: StoragePath) -> None:
        """Complete the checkpoint in `folder`, whose `files` are on disk."""
        self.saved_at = self.saved_at or time_after("")
        fields = dataclasses.asdict(self) | _NO_CHECKSUM
        own = {"crc32": f"{zlib.crc32(_as_text(fields)):08x}"}
        write_durably(folder / MANIFEST, _as_text(fields | own))

    @classmethod
    def read(cls, folder: StoragePath) -> Manifest:
        """Read a manifest. Raises `DamagedCheckpointError` if it is missing or has changed."""
        path = folder / MANIFEST
        try:
            text = read_again(path, path.read_bytes)
        except OSError as error:
            raise no_checkpoint(folder) from error
        try:
            fields = parse_json(text)
            own = fields.pop("crc32")
            # Without encoding the fields anew, which takes 20 ms for the files of 4,096 ranks.
            before, _, after = text.rpartition(own.encode())
            if own != f"{zlib.crc32(before + b'00000000' + after):08x}":
                raise DamagedCheckpointError(f"{path} is damaged: its checksum does not match")
            fields["files"] = {name: FileRecord(**of) for name, of in fields["files"].items()}
            manifest = cls(**fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DamagedCheckpointError(f"{path} is damaged: {first_line(error)}") from error
        for name in manifest.files:
            if "/" in name or "\\" in name:
                raise DamagedCheckpointError(
                    f"{path} is damaged: {name!r} is not a valid file name"
                )
        return manifest

    @classmethod
    def read_whole(cls, folder: StoragePath) -> Manifest:
        """Read a manifest and check the sizes of its files."""
        manifest = cls.read(folder)
        manifest.check_sizes(folder)
        return manifest

    def read_config(self, folder: StoragePath) -> dict[str, Any]:
        """Read the configuration of the run that saved the checkpoint; empty if it has none.

        Raises:
            DamagedCheckpointError: the file cannot be parsed or is missing.
            OutageError: the file cannot be read.
        """
        if CONFIG_FILE not in self.files:
            return {}
        path = folder / CONFIG_FILE
        return parse_again(path, lambda: tomllib.loads(hide_secrets(path.read_bytes().decode())))

    @property
    def is_converted(self) -> bool:
        """Whether `torchtitan convert from-hf` wrote the checkpoint."""
        return self.model_only and self.step == 0

    @property
    def nbytes(self) -> int:
        """Total size in bytes of all files except the manifest."""
        return sum(record.size for record in self.files.values())

    def check_sizes(self, folder: StoragePath) -> None:
        """Raise `DamagedCheckpointError` if a file is missing or has another size."""
        sizes = sizes_in(folder)
        for name, record in self.files.items():
            if name not in sizes:
                why = if_deleted(folder) or ": the checkpoint is damaged"
                raise DamagedCheckpointError(f"{folder / name} is missing{why}")
            if sizes[name] != record.size:
                raise DamagedCheckpointError(
                    f"{folder / name} is damaged: {record.size} bytes were written, but it has "
                    f"{sizes[name]}"
                )

    def check_contents(self, folder: StoragePath, names: Iterable[str]) -> None:
        """Read the files `names`; raise `DamagedCheckpointError` if one has changed."""
        if problems := self.damaged_files(folder, names):
            raise DamagedCheckpointError(problems[0])

    def damaged_files(self, folder: StoragePath, names: Iterable[str] | None = None) -> list[str]:
        """Return a problem for each file that has changed; `names`: look at these alone.

        Raises `OutageError`.
        """
        names = self.files if names is None else names

        def problem(name: str) -> str:
            path, written = folder / name, self.files[name]
            try:
                now = parse_again(path, partial(FileRecord.of, path))
            except DamagedCheckpointError as error:
                return str(error)
            if now == written:
                return ""
            return f"{path} is damaged: {written} was written, {now} is there"

        with ThreadPoolExecutor(AT_ONCE) as threads:
            return [text for text in threads.map(problem, names) if text]


def time_after(earlier: str) -> str:
    """Return the current time as `Manifest.saved_at`, but at least just after `earlier`."""
    now = datetime.now(UTC)
    with suppress(ValueError, TypeError, OverflowError):  # `earlier` is no time
        now = max(now, datetime.fromisoformat(earlier) + timedelta(microseconds=1))
    return now.isoformat(timespec="microseconds")
