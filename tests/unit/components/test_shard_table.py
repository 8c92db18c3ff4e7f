"""Of the shards of a checkpoint, a rank gets those that it reads, and no other."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.default_planner import create_default_local_load_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from torchtitan.components.checkpoint.shard_table import ShardTable

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Where a part begins, and its size."""


def grid(size: tuple[int, ...], parts: tuple[int, ...]) -> list[Box]:
    """A tensor cut into so many parts along each dimension; the last may be shorter, or empty."""
    boxes: list[Box] = [((), ())]
    for length, count in zip(size, parts, strict=True):
        step = -(-length // count)
        starts = [min(i * step, length) for i in range(count)]
        boxes = [
            ((*offsets, start), (*sizes, min(step, length - start)))
            for offsets, sizes in boxes
            for start in starts
        ]
    return boxes


def saved(tensors: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> Metadata:
    """Key -> size and `grid`. There is a value that is no tensor, too."""
    metadata = Metadata({"step": BytesStorageMetadata()}, storage_data={})
    metadata.storage_data[MetadataIndex("step")] = _StorageInfo("__0_0.distcp", 0, 9)
    for key, (size, parts) in tensors.items():
        chunks = []
        for rank, (offsets, sizes) in enumerate(grid(size, parts)):
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            place = _StorageInfo(f"__{rank}_0.distcp", 100 * rank, 10 + rank)
            metadata.storage_data[MetadataIndex(key, offsets, rank)] = place
        properties = TensorProperties(dtype=torch.float32)
        entry = TensorStorageMetadata(properties, torch.Size(size), chunks)
        metadata.state_dict_metadata[key] = entry
    return metadata


def part_of(size: tuple[int, ...], box: Box) -> torch.Tensor:
    """What a rank has that holds a part of a tensor, as a DTensor tells it."""
    tensor: Any = torch.empty(size)
    chunk = ChunkStorageMetadata(torch.Size(box[0]), torch.Size(box[1]))
    tensor.__create_chunk_list__ = lambda: [chunk]
    return tensor


SIZES = {"model.a": (7, 6), "model.b": (5,), "model.c": (), "model.d": (4, 3, 2)}
GRIDS: dict[str, list[tuple[int, ...]]] = {
    "model.a": [(1, 1), (3, 1), (1, 4), (2, 3), (7, 6)],
    "model.b": [(1,), (2,), (4,), (5,)],
    "model.c": [()],
    "model.d": [(1, 1, 1), (4, 1, 2), (2, 2, 1)],
}


@pytest.mark.parametrize("seed", range(20))
def test_a_rank_reads_the_same_as_of_the_whole_metadata(seed: int) -> None:
    draw = random.Random(seed)
    whole = saved({key: (size, draw.choice(GRIDS[key])) for key, size in SIZES.items()})
    keys = draw.sample(sorted(SIZES), 3)
    own = {key: draw.choice(grid(SIZES[key], draw.choice(GRIDS[key]))) for key in keys}
    flat: dict[str, Any] = {key: part_of(SIZES[key], box) for key, box in own.items()}
    flat["step"] = 0
    state = {"model": {key.removeprefix("model."): flat[key] for key in keys}, "step": 0}

    metadata = ShardTable.of(whole).metadata_for(state)

    plan = create_default_local_load_plan(flat, metadata)
    expected = create_default_local_load_plan(flat, whole)
    assert sorted(plan.items, key=str) == sorted(expected.items, key=str)
    for item in plan.items:
        index = item.storage_index
        assert metadata.storage_data[index] == whole.storage_data[index]
    read = {item.storage_index for item in plan.items}
    held = {
        MetadataIndex(key, chunk.offsets)
        for key, entry in metadata.state_dict_metadata.items()
        for chunk in getattr(entry, "chunks", [])
    }
    assert held == read - {MetadataIndex("step")}
    assert metadata.state_dict_metadata.keys() == whole.state_dict_metadata.keys()
    assert {index.fqn for index in metadata.storage_data} == whole.state_dict_metadata.keys()


def test_what_does_not_fit_has_a_file_but_no_shards() -> None:
    table = ShardTable.of(saved({"model.a": ((4, 2), (2, 1))}))
    entry: Any = table.metadata_for({"model": {"a": torch.empty(4)}}).state_dict_metadata["model.a"]
    assert entry.chunks == [] and entry.size == (4, 2)
    assert table.outline.storage_data[MetadataIndex("model.a", (2, 0))].offset == 100


def test_a_checkpoint_without_tensors() -> None:
    metadata = ShardTable.of(saved({})).metadata_for({"step": 1})
    assert metadata.storage_data.keys() == {MetadataIndex("step")}
