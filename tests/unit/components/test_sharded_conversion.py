"""How an adapter converts a sharded layer."""

from __future__ import annotations

import pytest
import torch
from checkpoint_run import world_of_one  # noqa: F401
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from torchtitan.components.checkpoint.converted import convert_sharded


@pytest.fixture
def layer(world_of_one: None) -> dict[str, DTensor]:  # noqa: F811
    mesh = init_device_mesh("cpu", (1,))
    return {"weight": distribute_tensor(torch.ones(2, 2), mesh, [Shard(0)])}


def test_what_cannot_be_computed_on_shards_is_on_the_whole_layer(layer: dict[str, DTensor]) -> None:
    def convert(layer: dict[str, DTensor]) -> dict[str, DTensor]:
        if layer["weight"].placements[0] == Shard(0):
            raise RuntimeError("not on shards")
        return layer

    assert convert_sharded(convert, layer)["weight"].placements == (Shard(0),)


def test_a_rank_without_memory_gathers_nothing_alone(layer: dict[str, DTensor]) -> None:
    calls = []

    def convert(layer: dict[str, DTensor]) -> dict[str, DTensor]:
        calls.append(layer)
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        convert_sharded(convert, layer)
    assert len(calls) == 1


def test_a_join_along_the_sharded_dimension_is_sharded_again(layer: dict[str, DTensor]) -> None:
    joined = convert_sharded(lambda one: {"joined": torch.cat([one["weight"]] * 2)}, layer)
    assert joined["joined"].placements == (Shard(0),)
    parts = convert_sharded(lambda one: {"half": one["joined"].chunk(2)[1]}, joined)
    assert parts["half"].placements == (Shard(0),)
    assert parts["half"].full_tensor().tolist() == [[1.0, 1.0]] * 2
