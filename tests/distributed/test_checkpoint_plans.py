"""What ranks tell rank 0 when they save or load: little, and yet all that there is."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from harness import on_ranks, run_ranks
from test_checkpoint_layouts import Run, full, world_size_of
from tiny_models import tiny_model
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    WriteItemType,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from torchtitan.components.checkpoint import opened, save_planner
from torchtitan.components.checkpoint.manifest import Manifest
from torchtitan.components.checkpoint.reader import CheckpointReader, read_state
from torchtitan.components.checkpoint.save_planner import LastSave, SharingSavePlanner
from torchtitan.components.checkpoint.save_table import Places
from torchtitan.components.checkpoint.series import CheckpointSeries
from torchtitan.components.checkpoint.writer import CheckpointWriter
from torchtitan.config import JobConfig
from torchtitan.errors import CheckpointError, ConfigError
from torchtitan.runtime.process_group import init_distributed

PARAMETERS = 7
SHARDED = 3 * PARAMETERS + 1
"""Weights, the two moments of AdamW, and the rows of the data."""


def plan(planner: DefaultSavePlanner, state: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    """On rank 0: what the ranks tell it, of which items, what it tells them, the metadata."""
    planner.set_up_planner(state, is_coordinator=dist.get_rank() == 0)
    own = planner.create_local_plan()
    gathered: Any = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object((own, planner.plan), gathered)
    if not gathered:
        return None, None, None, None
    told, plans = map(list, zip(*gathered, strict=True))
    return (told, plans, *planner.create_global_plan(told))


def metadata_of(last: LastSave, plans: list[Any], answers: list[Any]) -> Metadata:
    """The metadata that rank 0 writes, with places that do not matter."""
    assert last.table is not None
    pairs = enumerate(zip(plans, answers, strict=True))
    numbers = {rank: len(own.items) - len(left.items) for rank, (own, left) in pairs}
    places = {rank: Places(["file"], np.zeros((n, 3), np.int64)) for rank, n in numbers.items()}
    return pickle.loads(last.table.metadata(places, StorageMeta(), "1.0"))


def compare_plans(folder: Path, layout: str) -> None:
    run = Run(layout, folder)
    run.train(1)  # the optimizer has its state
    state = run.manager._state.state_dict()
    last = LastSave()
    told, plans, answers, sent = plan(SharingSavePlanner(dist.group.WORLD, last), state)
    everything, _, _, expected = plan(DefaultSavePlanner(), state)
    run.manager.close()
    if dist.get_rank() != 0:
        return
    assert sent == Metadata({})  # the ranks need no more
    metadata = metadata_of(last, plans, answers)
    all_told = {len(p.items) for p in everything}
    assert all_told == {len(expected.state_dict_metadata)}
    shared = all_told.pop() - SHARDED
    assert shared > 12 * PARAMETERS
    ranks_of = Counter(item.index for own in plans for item in own.items)
    assert ranks_of.keys() == {item.index for p in everything for item in p.items}
    repeated = {index.fqn for index, ranks in ranks_of.items() if ranks > 1}
    meshes = {name: tensor.device_mesh for name, tensor in state["model"].items()}
    of_all = {f"model.{name}" for name, mesh in meshes.items() if mesh.size() == len(told)}
    assert of_all and not of_all & repeated
    shards = [sum(item.type == WriteItemType.SHARD for item in own.items) for own in plans]
    assert max(shards) - min(shards) <= 1
    for own in plans:
        sizes = [item.tensor_storage_size() or 0 for item in own.items]
        assert sizes == sorted(sizes)  # as PyTorch writes from a GPU, so that all saves are alike
    share = -(-len(expected.planner_data) // len(told))
    assert all(len(own.items) <= SHARDED + share for own in told)
    assert all(len(own.items.paths) <= share for own in told)
    assert all(answer.planner_data is None for answer in answers)
    for metadata_of_all in metadata, expected:
        for entry in metadata_of_all.state_dict_metadata.values():
            if isinstance(entry, TensorStorageMetadata):
                entry.chunks.sort(key=lambda chunk: chunk.offsets)  # ranks took turns differently
    assert metadata.state_dict_metadata == expected.state_dict_metadata
    assert metadata.planner_data == expected.planner_data


@pytest.mark.parametrize("layout", ["fsdp2", "hsdp2x2", "fsdp2_tp2"])
def test_what_several_ranks_have_is_told_by_one(tmp_path: Path, layout: str) -> None:
    on_ranks(world_size_of(layout), compare_plans, tmp_path, layout)


def save_different_names(folder: Path) -> None:
    """Ranks 0 and 1 are a stage, rank 2 another, and rank 3 has a name more than that."""
    save_planner._SHARERS = 1
    rank = dist.get_rank()
    state: dict[str, Any] = {"common": {"value": 7}, "sizeless": torch.tensor(3.0)}
    state |= {f"stage-{max(rank, 1)}": {"a": torch.arange(4), "b": [rank > 1]}}
    if rank == 3:
        state |= {"stage-2": {"a": torch.arange(4), "b": [True]}}
    group, last, config = dist.new_group(backend="gloo"), LastSave(), JobConfig()
    config.job.dump_folder = str(folder)
    series = CheckpointSeries(config)
    folder = series.folder(1)
    dcp.save(
        state,
        storage_writer=CheckpointWriter(series, Manifest(1, False, {}), last, config),
        planner=SharingSavePlanner(group, last),
        process_group=group,
    )
    if rank == 0:
        assert FileSystemReader(folder).read_metadata().state_dict_metadata.keys() == {
            "common.value",
            "sizeless",
            *(f"stage-{stage}.{name}" for stage in (1, 2, 3) for name in "ab"),
        }
    loaded = {
        key: dict.fromkeys(value) if isinstance(value, dict) else torch.zeros(())
        for key, value in state.items()
    }
    for part in loaded.values():
        if isinstance(part, dict) and "a" in part:
            part["a"] = torch.zeros(4, dtype=torch.int64)
    dcp.load(loaded, storage_reader=FileSystemReader(folder), process_group=group)
    torch.testing.assert_close(loaded, state)


def test_what_some_ranks_alone_have_is_saved(tmp_path: Path) -> None:
    on_ranks(4, save_different_names, tmp_path)


def test_a_few_ranks_share_out_what_all_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save_planner, "_SHARERS", 2)
    shares = [save_planner.own_share("cab", [1, 2, 4], rank) for rank in range(5)]
    assert shares == [set(), {"a", "c"}, {"b"}, set(), set()]


def returned_metadata(folder: Path) -> None:
    returned = []
    save = dcp.save
    dcp.save = lambda *args, **kwargs: returned.append(save(*args, **kwargs))
    run = Run("fsdp2", folder)
    run.train(2)
    run.manager.close()
    assert [m.state_dict_metadata for m in returned] == [{}]
    assert [(m.storage_data, m.planner_data) for m in returned] == [(None, None)]
    saved = FileSystemReader(folder / "checkpoint" / "step-2").read_metadata()
    assert saved.state_dict_metadata and saved.storage_data and saved.planner_data


def test_ranks_are_not_sent_the_metadata_that_rank_0_has_written(tmp_path: Path) -> None:
    on_ranks(2, returned_metadata, tmp_path)


def load(folder: Path) -> None:
    run = Run("fsdp2_tp2", folder)
    run.train(2)
    run.manager.close()

    told = []
    gather = dist.gather_object

    def listen(obj, **kwargs):
        told.append(obj)
        gather(obj, **kwargs)

    dist.gather_object = listen
    resumed = Run("fsdp2_tp2", folder, seed=1)
    assert resumed.manager.load() == 2
    assert [plan.items for plan in told] == [[]]
    for name, value in run.model.state_dict().items():
        assert torch.equal(full(resumed.model.state_dict()[name]), full(value))


def test_ranks_tell_nothing_of_what_they_read(tmp_path: Path) -> None:
    on_ranks(4, load, tmp_path)


def load_by_shards(folder: Path) -> None:
    run = Run("fsdp4", folder)
    run.train(2)
    run.manager.close()
    given: list[Metadata] = []

    class Listening(CheckpointReader):
        def __init__(self, folder: Path, metadata: Metadata) -> None:
            super().__init__(folder, metadata)
            given.append(metadata)

    opened.CheckpointReader = Listening
    resumed = Run("fsdp4", folder, seed=1)
    assert resumed.manager.load() == 2
    (metadata,) = given
    entries = metadata.state_dict_metadata.values()
    chunks = [len(e.chunks) for e in entries if isinstance(e, TensorStorageMetadata)]
    assert len(chunks) >= SHARDED and set(chunks) <= {0, 1} and sum(chunks) >= SHARDED


def test_a_rank_is_told_where_its_own_shards_are(tmp_path: Path) -> None:
    on_ranks(4, load_by_shards, tmp_path)


def read_by_replicas(folder: Path, layout: str) -> None:
    trained = Run(layout, folder)
    trained.train(2)
    trained.manager.close()
    read: list[tuple[str, torch.Size, torch.Size]] = []
    sizes: list[int] = []

    class Listening(CheckpointReader):
        def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Any:
            for item in plan.items:
                # A scalar, which is no DTensor, is read by each rank.
                if item.type == LoadItemType.TENSOR and item.lengths:
                    read.append((item.dest_index.fqn, item.dest_index.offset, item.dest_offsets))
                    sizes.append(item.lengths.numel())
            return super().read_data(plan, planner)

    opened.CheckpointReader = Listening
    resumed = Run(layout, folder, seed=1)
    assert resumed.manager.load() == 2
    torch.testing.assert_close(resumed.everything(), trained.everything(), rtol=0, atol=0)
    for tensor in resumed.manager._state.state_dict()["model"].values():  # on each replica
        own = tensor.to_local().detach()
        least, most = own.clone(), own.clone()
        group = tensor.device_mesh.get_group("dp_replicate")
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=group)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
        torch.testing.assert_close(least, most, rtol=0, atol=0)
    resumed.manager.close()

    of_all: Any = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, (read, sum(sizes)))
    places = [place for own, _ in of_all for place in own]
    assert len(places) == len(set(places)) and len({name for name, *_ in places}) == SHARDED
    numbers = [number for _, number in of_all]
    assert max(numbers) < 1.5 * min(numbers)


@pytest.mark.parametrize("layout", ["ddp2", "hsdp2x2"])
def test_each_tensor_is_read_by_one_replica(tmp_path: Path, layout: str) -> None:
    on_ranks(world_size_of(layout), read_by_replicas, tmp_path, layout)


def load_different_names(folder: Path) -> None:
    """What one rank alone has a place for is read; what none has is refused on all of them."""
    rank = dist.get_rank()
    group = dist.new_group(backend="gloo")
    state = {"model": {"a": torch.arange(4), "b": torch.arange(2), "c": torch.arange(3)}}
    dcp.save(state, storage_writer=FileSystemWriter(folder), process_group=group)

    def read(*names: str) -> dict[str, Any]:
        own = {name: torch.zeros_like(state["model"][name]) for name in names}
        metadata = FileSystemReader(folder).read_metadata()
        read_state({"model": own}, CheckpointReader(folder, metadata), lambda key: True, group)
        return own

    loaded = read("a", "c") if rank == 0 else read("a", "b")
    torch.testing.assert_close(loaded, {name: state["model"][name] for name in loaded})
    with pytest.raises(CheckpointError, match=r"has model\.c, which this run does not use"):
        read("a") if rank == 0 else read("a", "b")


def test_a_name_is_read_by_some_rank_or_refused_on_all(tmp_path: Path) -> None:
    on_ranks(2, load_different_names, tmp_path)


def load_on_the_last_rank(folder: Path) -> None:
    """As the last of two pipeline stages, with a sharded model that the first does not have."""
    init_distributed(timeout_seconds=1)
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("pp", "dp"))
    if dist.get_rank() == 0:
        return
    model = tiny_model("llama3")
    fully_shard(model, mesh=mesh["dp"])
    with pytest.raises(ConfigError, match=r"all 2 ranks .* only 1 did within 0\.8 s"):
        model.load_checkpoint(folder)


def test_ranks_that_load_a_sharded_model_without_the_others_are_told(tmp_path: Path) -> None:
    run_ranks(load_on_the_last_rank, 2, tmp_path)
