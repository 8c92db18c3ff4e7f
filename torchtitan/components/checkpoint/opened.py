"""Open a checkpoint of ours, on all ranks together, and read parts of it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
import torch.nn as nn
from torch.distributed.checkpoint.metadata import Metadata

from torchtitan.errors import CheckpointError, DamagedCheckpointError
from torchtitan.protocols.changed_args import plain_args
from torchtitan.runtime.collective_calls import on_all_ranks, on_rank_zero
from torchtitan.tools.differences import nested_differences, told
from torchtitan.tools.text import few

from .manifest import MANIFEST, METADATA, Manifest
from .reader import CheckpointReader, read_metadata, read_state
from .retry import parse_again
from .shard_table import ShardTable
from .storage import StoragePath


@dataclass
class OpenCheckpoint:
    """A complete torchtitan checkpoint, all of whose files exist."""

    folder: StoragePath
    manifest: Manifest
    config: dict[str, Any]
    """Configuration of the run that saved it; empty: unknown."""
    metadata: Metadata
    """Without the places of shards, if `shards` has them."""
    shards: ShardTable | None = None

    @classmethod
    def open(
        cls, folder: StoragePath, group: dist.ProcessGroup | None, verify: bool = True
    ) -> OpenCheckpoint:
        """Open a checkpoint. All ranks of `group` call this; None: this process opens it alone.

        Args:
            verify: read all files and check their checksums, with the files divided among the
                ranks. Sizes are always checked.

        Raises:
            DamagedCheckpointError: on all ranks: a file is missing or has changed.
            OutageError: on all ranks: a file cannot be read.
        """
        manifest = on_rank_zero(lambda: Manifest.read_whole(folder), group)
        if verify:
            by_size = sorted(manifest.files, key=lambda name: (-manifest.files[name].size, name))
            on_all_ranks(
                lambda rank, ranks: manifest.check_contents(folder, by_size[rank::ranks]), group
            )
        config = on_rank_zero(lambda: manifest.read_config(folder), group)

        def read() -> Metadata:
            metadata = read_metadata(folder)
            for info in metadata.storage_data.values():
                if info.relative_path not in manifest.files:
                    raise DamagedCheckpointError(
                        f"{folder / METADATA} is damaged: it names {info.relative_path!r}, "
                        f"which {MANIFEST} does not"
                    )
            return metadata

        if group is None:
            return cls(folder, manifest, config, read())
        shards = ShardTable.share(
            lambda: parse_again(folder / METADATA, lambda: ShardTable.of(read())), group
        )
        return cls(folder, manifest, config, shards.outline, shards)

    def read_into(
        self,
        state: dict[str, Any],
        model: nn.Module,
        group: dist.ProcessGroup | None,
        is_unneeded: Callable[[str], bool] = lambda name: False,
    ) -> None:
        """Load the parts of `state` ("model", "optimizer", ...) in place; skip other parts.

        Args:
            is_unneeded: name within a part -> whether `state` may lack it.

        Raises:
            CheckpointError: a file is damaged, or keys or shapes do not fit. The message lists the
                hyperparameters in which `model` differs from the saved one.
            OutageError: a file cannot be read.
        """
        parts = set(state)
        metadata = self.shards.metadata_for(state) if self.shards else self.metadata
        reader = CheckpointReader(self.folder, metadata)

        def is_wanted(key: str) -> bool:
            part, _, name = key.partition(".")
            return part in parts and not is_unneeded(name)

        try:
            read_state(state, reader, is_wanted, group)
        except DamagedCheckpointError:
            raise
        except CheckpointError as error:
            others = self.differences_from(model)
            note = f". It was saved from another model: {few(others)}" if others else ""
            raise type(error)(f"{error}{note}") from error

    def differences_from(self, model: nn.Module, ignored: Collection[str] = ()) -> list[str]:
        """Return the hyperparameters in which `model`, if it has `args`, differs from the saved."""
        saved = self.manifest.model.get("args", {})
        current = plain_args(getattr(model, "args", None))
        if not (saved and current):
            return []
        return told(nested_differences(saved, current, ignored, may_lack_options=True))
