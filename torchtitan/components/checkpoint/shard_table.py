"""Send the places of a checkpoint's shards to all ranks as one table of numbers.

Thousands of ranks save millions of shards, of which each rank reads only a few thousand. As a
Python object, a shard takes 2 kB, and 15 us to pickle on rank 0 and to unpickle on every rank. In
the table it takes some 60 bytes, and a rank makes objects only for the shards that it reads.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import _create_chunk_list

from torchtitan.distributed.dtensor import finding_once
from torchtitan.runtime.collective_calls import on_rank_zero
from torchtitan.tools.garbage_collection import without_collection


@dataclass
class ShardTable:
    """The shards of all tensors of a checkpoint."""

    outline: Metadata
    """The metadata without shards, except for the place of each tensor's last one, which error
    messages name."""
    rows: dict[str, range]
    """Key of a tensor -> its rows in the table."""
    files: list[str]
    dims: int
    """The most dimensions of a tensor."""
    table: torch.Tensor
    """`[shards, 2 * dims + 3]` int64: offsets, sizes (0 and 1 in dimensions that a tensor lacks),
    number of the file, offset and length in it."""

    @classmethod
    @without_collection()
    def of(cls, metadata: Metadata) -> ShardTable:
        """Make the table. Damaged metadata raises errors of any kind."""
        entries: dict[str, Any] = metadata.state_dict_metadata
        tensors = {k: e for k, e in entries.items() if isinstance(e, TensorStorageMetadata)}
        dims = max((len(entry.size) for entry in tensors.values()), default=0)
        outline = dataclasses.replace(
            metadata,
            state_dict_metadata=dict(entries),
            storage_data={i: at for i, at in metadata.storage_data.items() if i.fqn not in tensors},
        )
        places: dict[str, dict[Any, Any]] = defaultdict(dict)
        for index, at in metadata.storage_data.items():  # hashing one anew takes 5 us
            places[index.fqn][index.offset] = at
        numbers, rows, count = array("q"), {}, 0
        files: dict[str, int] = {}
        for key, entry in tensors.items():
            of_key, missing = places[key], dims - len(entry.size)
            zeros, ones = (0,) * missing, (1,) * missing
            for chunk in entry.chunks:
                at = of_key[chunk.offsets]
                file = files.setdefault(at.relative_path, len(files))
                box = (*chunk.offsets, *zeros, *chunk.sizes, *ones)
                numbers.extend((*box, file, at.offset, at.length))
            rows[key] = range(count, count + len(entry.chunks))
            count = rows[key].stop
            if entry.chunks:
                outline.storage_data[MetadataIndex(key, chunk.offsets)] = at
            outline.state_dict_metadata[key] = dataclasses.replace(entry, chunks=[])
        table = torch.from_numpy(np.asarray(numbers)).view(count, 2 * dims + 3)
        return cls(outline, rows, list(files), dims, table)

    @classmethod
    def share(cls, make: Callable[[], ShardTable], group: dist.ProcessGroup) -> ShardTable:
        """Call `make` on rank 0; return its result, or raise its error, on all ranks of `group`."""
        table = torch.empty(0)

        def but_for_table() -> tuple[ShardTable, torch.Size]:
            nonlocal table
            shards = make()
            table = shards.table
            return dataclasses.replace(shards, table=torch.empty(0)), table.shape

        shards, shape = on_rank_zero(but_for_table, group)
        shards.table = table if dist.get_rank() == 0 else torch.empty(shape, dtype=torch.int64)
        dist.broadcast(shards.table, 0, group=group)  # pickled, it would be in memory three times
        return shards

    @finding_once()
    def metadata_for(self, state: dict[str, Any]) -> Metadata:
        """Return metadata with the shards that this rank reads to fill `state`.

        Tensors of another shape get no shards.
        """
        metadata = dataclasses.replace(
            self.outline,
            state_dict_metadata=dict(self.outline.state_dict_metadata),
            storage_data=dict(self.outline.storage_data),
        )
        flat, _ = flatten_state_dict(state)
        for key, value in flat.items():
            entry: Any = metadata.state_dict_metadata.get(key)
            fits = isinstance(value, torch.Tensor) and key in self.rows
            if not fits or value.shape != entry.size:
                continue
            rows = self.table[self.rows[key].start : self.rows[key].stop]
            dims, chunks = len(entry.size), []
            for row in rows[self._overlapping(rows, _create_chunk_list(value), dims)].tolist():
                offsets, sizes = row[:dims], row[self.dims : self.dims + dims]
                chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
                *_, file, offset, length = row
                chunks.append(chunk)
                at = _StorageInfo(self.files[file], offset, length)
                metadata.storage_data[MetadataIndex(key, chunk.offsets)] = at
            metadata.state_dict_metadata[key] = dataclasses.replace(entry, chunks=chunks)
        return metadata

    def _overlapping(
        self, rows: torch.Tensor, own: list[ChunkStorageMetadata], dims: int
    ) -> torch.Tensor:
        """Return which rows overlap with a chunk of `own`: `[rows]` bool."""
        begins = rows[:, :dims]
        ends = begins + rows[:, self.dims : self.dims + dims]
        found = torch.zeros(len(rows), dtype=torch.bool)
        for chunk in own:
            begin = torch.tensor(chunk.offsets, dtype=torch.int64)
            end = begin + torch.tensor(chunk.sizes, dtype=torch.int64)
            found |= ((begins < end) & (ends > begin)).all(dim=1)
        return found
