"""A rank's place in a sharded tensor is found once for all of a shape, and is PyTorch's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from torchtitan.components.checkpoint import huggingface_save
from torchtitan.components.checkpoint.reader import ExactLoadPlanner
from torchtitan.components.checkpoint.save_planner import LastSave, SharingSavePlanner
from torchtitan.components.checkpoint.shard_table import ShardTable
from torchtitan.components.checkpoint.shared_reading import SharedReading
from torchtitan.distributed import dtensor
from torchtitan.runtime.fake_world import fake_world

SHAPES = {"a": (64, 3), "b": (64, 3), "c": (128,), "d": (128,)}
ONCE = {torch.Size((64, 3)): 1, torch.Size((128,)): 1}


@pytest.fixture
def state() -> Iterator[dict[str, Any]]:
    """Of a rank of 8 x 4, whose two dimensions share the rows of each tensor."""
    with fake_world(32, 13):
        mesh = init_device_mesh("cpu", (8, 4))
        placements = [_StridedShard(0, split_factor=4), Shard(0)]
        yield {
            name: DTensor.from_local(
                torch.zeros(shape[0] // 32, *shape[1:]),
                mesh,
                placements,
                shape=torch.Size(shape),
                stride=(3, 1)[-len(shape) :],
            )
            for name, shape in SHAPES.items()
        }


@pytest.fixture
def looked_for(monkeypatch: pytest.MonkeyPatch) -> Counter[torch.Size]:
    """How often the place of a tensor of a shape was looked for."""
    counts: Counter[torch.Size] = Counter()

    def counting(shape: torch.Size, *of: Any) -> Any:
        counts[shape] += 1
        return compute_local_shape_and_global_offset(shape, *of)

    monkeypatch.setattr(dtensor, "compute_local_shape_and_global_offset", counting)
    return counts


def place_of(tensor: Any) -> tuple[torch.Size, torch.Size]:
    sizes, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return torch.Size(offsets), torch.Size(sizes)


def test_to_save(state: dict[str, Any], looked_for: Counter[torch.Size]) -> None:
    planner = SharingSavePlanner(dist.group.WORLD, LastSave())
    planner.set_up_planner(state, is_coordinator=True)
    planner.create_local_plan()
    assert looked_for == ONCE
    for item in planner.plan.items:
        assert item.tensor_data is not None
        chunk = item.tensor_data.chunk
        assert (chunk.offsets, chunk.sizes) == place_of(state[item.index.fqn])


def test_to_load(state: dict[str, Any], looked_for: Counter[torch.Size]) -> None:
    whole = Metadata({}, storage_data={})
    for name, shape in SHAPES.items():
        zeros = torch.Size([0] * len(shape))
        chunk = ChunkStorageMetadata(zeros, torch.Size(shape))
        whole.state_dict_metadata[name] = TensorStorageMetadata(
            TensorProperties(dtype=torch.float32), torch.Size(shape), [chunk]
        )
        whole.storage_data[MetadataIndex(name, zeros)] = _StorageInfo("__0_0.distcp", 0, 9)
    metadata = ShardTable.of(whole).metadata_for(state)
    assert looked_for == ONCE
    looked_for.clear()
    planner = ExactLoadPlanner(Path("step-1"), lambda key: True, None)
    planner.set_up_planner(state, metadata, is_coordinator=True)
    planner.create_local_plan()
    assert looked_for == ONCE
    for item in planner.finish_plan(LoadPlan([])).items:
        assert item.storage_offsets == place_of(state[item.dest_index.fqn])[0]


def test_to_export(state: dict[str, Any], looked_for: Counter[torch.Size]) -> None:
    parts = huggingface_save._local_parts(state)
    assert looked_for == ONCE
    for name, (box, _) in parts.items():
        assert box == place_of(state[name])


@pytest.fixture(params=range(8))
def rank(request: pytest.FixtureRequest) -> Iterator[int]:
    """One of 4 replicas of 2 ranks."""
    with fake_world(8, request.param):
        yield request.param


@pytest.fixture
def sharded(rank: int) -> Callable[..., DTensor]:
    """A DTensor of a local one, by default the same in all replicas."""
    mesh = init_device_mesh("cpu", (4, 2), mesh_dim_names=("dp_replicate", "dp_shard_cp"))

    def make(local: torch.Tensor, over_replicas: Placement = Replicate()) -> DTensor:  # noqa: B008
        return DTensor.from_local(local, mesh, [over_replicas, Shard(0)])

    return make


def test_of_replicas_one_tells_of_a_part_for_an_export(
    rank: int, sharded: Callable[..., DTensor]
) -> None:
    tensors = [sharded(torch.ones(2, 3))] * 4 + [torch.ones(3)]
    told = [number for number, t in enumerate(tensors) if huggingface_save._tells(number, t)]
    assert told == [rank // 2, 4]


def test_replicas_divide_what_they_read_by_size(rank: int, sharded: Callable[..., DTensor]) -> None:
    state = {f"of {n}": sharded(torch.ones(n, 3)) for n in (1, 1000, 2, 998, 997, 999)}
    state |= {
        "different": sharded(torch.ones(2000, 3), Shard(0)),
        "empty": sharded(torch.ones(0, 3)),
        "transposed": sharded(torch.ones(3, 2000).T),
        "whole": torch.ones(3),
        "step": 3,
    }
    alone = {"different", "empty", "step", "transposed", "whole"}
    shares = {"of 1000"}, {"of 999"}, {"of 998", "of 1"}, {"of 997", "of 2"}
    assert state.keys() - SharedReading(state).of_others == alone | shares[rank // 2]
