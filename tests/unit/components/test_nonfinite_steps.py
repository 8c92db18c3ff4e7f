"""What the numerical guard does on one process."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from checkpoint_run import world_of_one  # noqa: F401

from torchtitan.components import guard as guard_module
from torchtitan.components.guard import Guard, refuse_nonfinite_step, refuse_nonfinite_weights
from torchtitan.config import JobConfig
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.errors import TrainingError

NAN = float("nan")


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Guard]:
    config = JobConfig()
    config.job.dump_folder = str(tmp_path)
    config.training.on_nonfinite = config.training.on_spike = "skip"
    config.training.spike_sigmas = 3.0
    config.training.bad_step_limit = 2

    def build(dims: ParallelDims | None = None, spike_window: int = 4) -> Guard:
        config.training.spike_window = spike_window
        return Guard(config, dims or ParallelDims(world_size=1), 0, "bytes")

    return build


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the bad batches that are kept."""
    names: list[str] = []
    keep = lambda folder, *args: names.append(folder.name)  # noqa: E731
    monkeypatch.setattr(guard_module, "keep_batch", keep)
    return names


def allows(guard: Guard, step: int, loss: float, norm: float = 1.0) -> bool:
    return guard.allows(step, torch.tensor(loss), torch.tensor(norm), [{}])


def test_a_batch_that_cannot_be_kept_does_not_end_the_run(
    build: Callable[..., Guard], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*args: object) -> None:
        raise ValueError("unlike\nmore lines")

    monkeypatch.setattr(guard_module, "keep_batch", fails)
    guard = build()
    with caplog.at_level("WARNING"):
        assert not allows(guard, 2, NAN)
    assert guard.counts.steps_skipped == 1
    assert "the bad batch 2 cannot be kept: ValueError: unlike\n" in caplog.text
    assert "The batch is skipped. The batch could not be kept" in caplog.text


def test_a_batch_to_skip_is_found_where_rollbacks_moved_it(tmp_path: Path) -> None:
    config = JobConfig()
    config.job.dump_folder = str(tmp_path)
    config.training.skip_batches = ["3-4", "9"]
    guard = Guard(config, ParallelDims(world_size=1), 0, "bytes")
    assert [step for step in range(1, 12) if guard.begin_step(step)] == [3, 4, 9]
    assert guard.metrics()["steps_skipped"] == 0  # none is done
    guard.count_left_out()
    assert guard.metrics()["steps_skipped"] == 1
    guard.counts.batches_skipped = 6
    assert [step for step in range(1, 12) if guard.begin_step(step)] == [3]
    assert allows(guard, 3, NAN)  # nothing else is asked of it


def test_the_saved_history_has_one_length_whatever_its_numbers() -> None:
    """So that where other values of a checkpoint are does not change from save to save."""
    guard = Guard(JobConfig(), ParallelDims(world_size=1), 0, "bytes")
    lengths = set()
    for history in [(2 / 3, 1 / 3)] * 128, [(7 / 3, 1e-7 / 3)] * 128:
        guard._history.extend(history)
        state = guard.state_dict()
        lengths.add(len(state["json"]))
        guard.load_state_dict(state)
        assert list(guard._history) == history
    assert lengths == {8192}


def test_a_spike_of_the_norm_alone_is_seen(build: Callable[..., Guard], kept: list[str]) -> None:
    guard = build()
    for step, (loss, norm) in enumerate([(2.0, 1.0), (2.1, 1.1), (2.0, 0.9), (1.9, 1.0)], start=1):
        assert allows(guard, step, loss, norm)
    assert not allows(guard, 5, 2.0, 50.0)
    assert guard.counts.steps_skipped == 1 and kept == ["batch-5"]


@pytest.mark.usefixtures("kept")
def test_a_spike_lies_beyond_the_sigmas_once_half_of_the_window_is_filled(
    build: Callable[..., Guard],
) -> None:
    guard = build(spike_window=8)
    for step, loss in enumerate([3.0, 3.0, 1.0], start=1):
        assert allows(guard, step, loss)
    assert allows(guard, 4, 1.0, 1.0)  # now the mean is 2 and the standard deviation 1
    assert not allows(guard, 5, 5.01)
    assert allows(guard, 6, 4.99)
    young = build(spike_window=8)
    assert all(allows(young, step, loss) for step, loss in enumerate([1.0, 1.0, 1.0, 50.0]))


def test_spikes_alone_may_be_warned_of_and_are_part_of_the_history(
    tmp_path: Path, kept: list[str]
) -> None:
    """Else a run that stays at another loss would be warned of for ever."""
    config = JobConfig()
    config.job.dump_folder = str(tmp_path)
    config.training.on_spike, config.training.spike_window = "warn", 4
    config.training.spike_sigmas = 3.0
    guard = Guard(config, ParallelDims(world_size=1), 0, "bytes")
    losses = [1.0, 1.1, 1.0, 1.1, 50.0, 50.0]
    assert all(allows(guard, step, loss) for step, loss in enumerate(losses, start=1))
    assert kept == ["batch-5"] and not guard.troubled
    with pytest.raises(TrainingError, match="step 7, batch 7 of the data: the loss is nan"):
        allows(guard, 7, NAN)


@pytest.mark.usefixtures("kept")
def test_as_many_bad_steps_in_a_row_as_the_limit_are_skipped(build: Callable[..., Guard]) -> None:
    guard = build()
    for step in (1, 4):
        assert not allows(guard, step, NAN)
        assert not allows(guard, step + 1, 2.0, float("inf")) and guard.troubled
        assert allows(guard, step + 2, 2.0) and not guard.troubled
    assert not allows(guard, 7, NAN) and not allows(guard, 8, NAN)
    with pytest.raises(TrainingError, match="makes 3 bad steps in a row"):
        allows(guard, 9, NAN)


@pytest.mark.usefixtures("kept")
def test_a_resumed_guard_knows_the_steps_before(build: Callable[..., Guard]) -> None:
    guard, resumed = build(), build()
    assert allows(resumed, 1, 9.0)  # of another run's steps, which its state replaces
    for step, loss in enumerate([2.0, 2.1, 1.9], start=1):
        assert allows(guard, step, loss)
    resumed.load_state_dict(guard.state_dict())
    assert not allows(resumed, 4, 3.0)


@pytest.mark.usefixtures("kept")
def test_a_rollback_is_due_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The next step may be one that is left out, of which `allows` is not asked."""
    config = JobConfig()
    config.job.dump_folder = str(tmp_path)
    config.training.on_nonfinite, config.training.on_spike = "rollback", "skip"
    guard = Guard(config, ParallelDims(world_size=1), 0, "bytes")
    assert not allows(guard, 4, NAN) and guard.rollback_due
    guard.cannot_roll_back(4)
    assert not guard.rollback_due and guard.counts.steps_skipped == 1
    assert not allows(guard, 5, NAN) and guard.rollback_due
    guard.rolled_back(5, 2)
    assert not guard.rollback_due and guard.counts.rollbacks == 1
    assert caplog.messages[-1].endswith("of step 2. Step 3 trains on batch 6 of the data")


def test_rollbacks_to_other_checkpoints_do_not_add_up(build: Callable[..., Guard]) -> None:
    guard = build()
    for step in (4, 8, 12, 16):
        guard.rolled_back(step, step - 2)
    assert guard.counts.batches_skipped == 8
    guard.rolled_back(16, 14)
    with pytest.raises(TrainingError, match="step 16: 3 rollbacks to the checkpoint of step 14"):
        guard.rolled_back(16, 14)


def test_no_more_than_some_bad_batches_are_kept(
    build: Callable[..., Guard], kept: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard_module, "_MOST_KEPT_BATCHES", 2)
    guard = build()
    for step in (1, 3, 5):
        assert not allows(guard, step, NAN)
        assert allows(guard, step + 1, 2.0)
    assert kept == ["batch-1", "batch-3"]


class Mesh(dict[str, Any]):
    """A rank's place in each dimension."""

    mesh_dim_names = property(tuple)


@pytest.mark.parametrize("dim", ["dp", "pp", "cp", "tp"])
def test_of_the_ranks_of_the_same_rows_the_first_keeps_them(
    dim: str, build: Callable[..., Guard], kept: list[str]
) -> None:
    """Else they would write the same files at once."""
    for rank in range(2):
        mesh = Mesh({dim: SimpleNamespace(get_local_rank=lambda rank=rank: rank)})
        dims = SimpleNamespace(loss_copies=1, world_mesh=mesh)
        assert not allows(build(cast(ParallelDims, dims)), 1, NAN)
    assert len(kept) == (2 if dim == "dp" else 1)


def test_the_loss_is_that_of_all_ranks_and_the_norm_that_of_each(
    build: Callable[..., Guard], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four ranks, two and two have the same part of the batch."""
    facts: list[dict[str, Any]] = []
    monkeypatch.setattr(guard_module, "keep_batch", lambda *args: facts.append(args[-1]))
    monkeypatch.setattr(guard_module.dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(guard_module, "sum_over_ranks", lambda values: values.mul_(4))
    dims = SimpleNamespace(loss_copies=2, world_mesh=Mesh())
    guard = build(cast(ParallelDims, dims))
    for step, loss in enumerate([1.5, 1.5, 30.0], start=1):
        allows(guard, step, loss, 5.0)
    [kept] = facts
    assert (kept["loss"], kept["grad_norm"]) == ("60.0", "5.0")


def test_a_step_without_a_guard_is_finite_in_loss_and_norm() -> None:
    refuse_nonfinite_step(3, 2.0, 1.0, lambda: "step-2")
    for loss, norm in (NAN, 1.0), (2.0, float("inf")):
        with pytest.raises(TrainingError, match=rf"^step 3: the loss is {loss} .* is {norm}\. "):
            refuse_nonfinite_step(3, loss, norm, lambda: "step-2")
    assert Guard(JobConfig(), ParallelDims(world_size=1), 0, "bytes").metrics() == {}
    with pytest.raises(TrainingError, match=r"The last good checkpoint is \(none\)"):
        refuse_nonfinite_step(3, NAN, NAN, lambda: None)


def test_weights_that_are_bad_on_another_rank_are_refused_here_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else this rank would wait in the save for the one that raised."""
    refuse_nonfinite_weights([torch.ones(2)], 3)
    with pytest.raises(TrainingError, match="step 3: weights are not finite"):
        refuse_nonfinite_weights([torch.ones(2), torch.tensor([1.0, NAN])], 3)
    monkeypatch.setattr(guard_module, "sum_over_ranks", lambda bad: bad.add_(1))
    with pytest.raises(TrainingError, match="step 3: weights are not finite"):
        refuse_nonfinite_weights([torch.ones(2)], 3)
