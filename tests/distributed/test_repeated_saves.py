"""What no rank has to tell anew is neither told nor planned again, and nothing wrong is saved so.

Each checkpoint is held against one of PyTorch's own, saved at the same step without any memory of
earlier saves, and read by PyTorch alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from harness import on_ranks, train
from test_checkpoint_layouts import Run, world_size_of
from tiny_llama import OPTIONS
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from torchtitan.commands.checkpoint.listing import verify
from torchtitan.components.checkpoint import folder as folders
from torchtitan.components.checkpoint.save_planner import SharingSavePlanner
from torchtitan.components.checkpoint.storage import CheckpointFiles
from torchtitan.components.checkpoint.writer import CheckpointWriter

NOTHING, RESULTS, ALL = "nothing", "where it was written", "what it has and where it was written"


class WatchedRun:
    """Saves at each `step` as PyTorch does too, and knows what this rank has told for its own."""

    def __init__(self, layout: str, folder: Path, **checkpoint: Any) -> None:
        self.run = Run(layout, folder, **{"interval": 1, "keep_latest_k": 0} | checkpoint)
        self.more: dict[str, Any] = {}
        """What the state of training has beside."""
        self.frozen = ""
        """End of the names of parameters that the optimizer has no longer."""
        counter, optimizers = self.run.counter, self.run.optimizers
        state_of_counter, state_of_optimizers = counter.state_dict, optimizers.state_dict
        counter.state_dict = lambda: state_of_counter() | self.more
        optimizers.state_dict = lambda: {
            key: value
            for key, value in state_of_optimizers().items()
            if not self.frozen or self.frozen not in key
        }
        self._folder = folder / "by_pytorch"
        self.manager = self.run.manager

    def step(self, last: bool = False, meanwhile: tuple[Any, str, Any] | None = None) -> str:
        """Returns what this rank has told rank 0. `meanwhile`: an attribute and its value then."""
        run, told = self.run, []
        gather = dist.gather_object

        def listen(obj: Any, **kwargs: Any) -> None:
            told.append(len(obj) - 1 if told else len(getattr(obj, "items", ())))
            gather(obj, **kwargs)

        with torch.no_grad():
            for weight in run.model.parameters():
                weight.add_(1)
        run.counter.step += 1
        step, state = run.counter.step, run.manager._state
        files = FileSystemWriter(self._folder / f"step-{step}", sync_files=False)
        export = last and step == run.manager._total_steps
        dcp.save(state.export() if export else state.state_dict(), storage_writer=files)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "gather_object", listen)
            if meanwhile:
                patch.setattr(*meanwhile)
            run.manager.save(step, last)
            run.manager.wait()
        plan, results = [*told, 0, 0][:2]
        return ALL if plan else RESULTS if results else NOTHING


def read_by_pytorch(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = {}
    reader, planner = FileSystemReader(folder), _EmptyStateDictLoadPlanner()
    _load_state_dict(state, storage_reader=reader, planner=planner, no_dist=True)
    return state


def assert_right(folder: Path, steps: list[int]) -> None:
    saved = folders.list_checkpoints(folder / "checkpoint")
    assert [folders.step_of(path) for path in saved] == steps
    assert verify([str(folder)]) == 0
    for path in saved:
        expected = read_by_pytorch(folder / "by_pytorch" / path.name)
        torch.testing.assert_close(read_by_pytorch(path), expected, rtol=0, atol=0)


def own(run: WatchedRun, value: Any) -> None:
    """Have the last rank, and no other, save a value; None: it has none."""
    if dist.get_rank() == dist.get_world_size() - 1:
        run.more = {} if value is None else {"own": value}


def common(run: WatchedRun, value: Any) -> None:
    run.more["common"] = value


def distributed(run: WatchedRun, shape: tuple[int, int], how: Placement) -> DTensor:
    return distribute_tensor(torch.randn(shape), run.run.dp_mesh, [how])


CHANGES: dict[str, Callable[[WatchedRun], None]] = {
    "a name more on one rank": lambda run: own(run, torch.arange(3)),
    "another shape": lambda run: own(run, torch.arange(5)),
    "another dtype": lambda run: own(run, torch.arange(5).float()),
    "no tensor": lambda run: own(run, [1, 2]),
    "a name less": lambda run: own(run, None),
    "a name more on all": lambda run: common(run, torch.ones(3, 2)),
    "sharded": lambda run: common(run, distributed(run, (2, 4), Shard(0))),
    "sharded otherwise": lambda run: common(run, distributed(run, (4, 2), Shard(1))),
    "replicated": lambda run: common(run, distributed(run, (4, 4), Replicate())),
    "frozen": lambda run: setattr(run, "frozen", ".output."),
    "trained again": lambda run: setattr(run, "frozen", ""),
}


FEW = ["a name more on one rank", "another dtype", "sharded"]


def save_changes(folder: Path, layout: str, async_mode: str, changes: list[str]) -> None:
    run = WatchedRun(layout, folder, async_mode=async_mode)
    assert [run.step(), run.step(), run.step()] == [ALL, NOTHING, NOTHING]
    for name in changes:
        CHANGES[name](run)
        assert run.step() == ALL, name
    assert run.step() == NOTHING
    run.manager.close()


@pytest.mark.parametrize(
    ("layout", "async_mode", "changes"),
    [
        ("fsdp2", "disabled", [*CHANGES]),
        pytest.param("hsdp2x2", "async", FEW, marks=pytest.mark.long),
    ],
)
def test_a_change_of_one_rank_is_told_by_all(
    tmp_path: Path, layout: str, async_mode: str, changes: list[str]
) -> None:
    on_ranks(world_size_of(layout), save_changes, tmp_path, layout, async_mode, changes)
    assert_right(tmp_path, [*range(1, 5 + len(changes))])


def save_longer_values(folder: Path) -> None:
    """The rank that writes a value tells where all of its items are now, and no other rank does."""
    run = WatchedRun("fsdp2", folder)
    for length, told in (1, [ALL, ALL]), (99, [NOTHING, RESULTS]), (999, [NOTHING, RESULTS]):
        own(run, [0] * length)
        assert run.step() == told[dist.get_rank()]
        assert run.step() == NOTHING
    run.manager.close()


def test_a_value_that_takes_more_bytes_than_before(tmp_path: Path) -> None:
    on_ranks(2, save_longer_values, tmp_path)
    assert_right(tmp_path, [1, 2, 3, 4, 5, 6])
    contents = [(tmp_path / f"checkpoint/step-{n}/.metadata").read_bytes() for n in range(1, 7)]
    assert contents[::2] == contents[1::2] and len(set(contents)) == 3


def fail(*args: Any) -> Any:
    raise OSError(5, "Input/output error")


FAILURES = {
    "what a rank tells": (DefaultSavePlanner, "create_local_plan", 1),
    "a rank's plan": (SharingSavePlanner, "finish_plan", 1),
    "a rank's file": (CheckpointFiles, "create_stream", 1),
    "rank 0 begins": (folders, "begin", 0),
    "rank 0 completes": (folders, "commit", 0),
    "results of a rank": (CheckpointWriter, "write_data", 1),
    "metadata": (CheckpointWriter, "finish", 0),
}


def save_after_failures(folder: Path, async_mode: str) -> None:
    run = WatchedRun("fsdp2", folder, async_mode=async_mode)
    own(run, [0])
    assert run.step() == ALL
    for name, (owner, function, rank) in FAILURES.items():
        own(run, [0] * 999)  # so that the failed save has something to tell
        run.step(meanwhile=(owner, function, fail) if dist.get_rank() == rank else None)
        own(run, [0])
        assert run.manager.last_saved == run.run.counter.step - 1, name
        assert run.step() == ALL, name
    assert run.step() == NOTHING
    run.manager.close()


@pytest.mark.parametrize("async_mode", [pytest.param("disabled", marks=pytest.mark.long), "async"])
def test_after_a_save_that_failed_all_is_told(tmp_path: Path, async_mode: str) -> None:
    on_ranks(2, save_after_failures, tmp_path, async_mode)
    assert_right(tmp_path, [*range(1, 2 + 2 * len(FAILURES), 2), 2 + 2 * len(FAILURES)])


def save_from_pinned_memory_and_not(folder: Path) -> None:
    """As where the last save is from a GPU, and those before were in the background."""
    run = WatchedRun("fsdp2", folder, async_mode="async")
    pinned = torch.Tensor, "is_pinned", lambda tensor: True
    assert [run.step(meanwhile=pinned), run.step(meanwhile=pinned)] == [ALL, NOTHING]
    assert run.step(last=True) == NOTHING
    run.manager.close()


def test_the_last_save_repeats_those_in_the_background(tmp_path: Path) -> None:
    on_ranks(2, save_from_pinned_memory_and_not, tmp_path)
    assert_right(tmp_path, [1, 2, 3])


@pytest.mark.parametrize("async_mode", [pytest.param("disabled", marks=pytest.mark.long), "async"])
def test_saves_of_a_whole_run_are_alike(tmp_path: Path, async_mode: str) -> None:
    """The same `.metadata`, with the name that PyTorch gives a save, is that of a save repeated."""
    guard = ("--training.on_spike=skip", "--training.spike_window=6", "--training.spike_sigmas=99")
    mode = f"--checkpoint.async_mode={async_mode}"
    saving = ("--checkpoint.enable", "--checkpoint.interval=1", "--checkpoint.keep_latest_k=0")
    train(tmp_path, *OPTIONS, *guard, *saving, mode, "--training.steps=12", ranks=2)
    contents = [(tmp_path / f"checkpoint/step-{n}/.metadata").read_bytes() for n in range(1, 13)]
    assert len(set(contents[6:])) == 1  # before, the window of the guard is not full


def save_others_between(folder: Path) -> None:
    """Going back, an export, and a run of another layout in the same process."""
    run = WatchedRun("fsdp2", folder, last_save_model_only=True, async_mode="async")
    assert [run.step(), run.step()] == [ALL, NOTHING]
    assert run.manager.roll_back() == 2
    assert run.step() == NOTHING
    run.manager._total_steps = 4
    assert run.step(last=True) == ALL
    run.manager._total_steps = 10
    assert [run.step(), run.step()] == [ALL, NOTHING]
    other = WatchedRun("tp2", folder)
    assert other.manager.load() == 6
    assert [other.step(), other.step()] == [ALL, NOTHING]
    assert run.manager.roll_back() == 6
    run.run.counter.step = 8
    assert run.step() == NOTHING
    run.manager.close()
    other.manager.close()


def test_what_else_happens_between_two_saves(tmp_path: Path) -> None:
    on_ranks(2, save_others_between, tmp_path)
    assert_right(tmp_path, [*range(1, 10)])
