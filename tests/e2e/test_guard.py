"""Bad steps are skipped, or the run goes back; the same on every layout."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from equality import newest_weights
from harness import Finished, checkpoints_in, command, read_lines
from tiny_llama import OPTIONS

from torchtitan.runtime.stop_request import PREEMPTED

POISONED = (*OPTIONS, "--job.custom_import=poisoned_llama", "--model.name=poisoned_llama")
SAVE_EACH = ("--checkpoint.enable", "--checkpoint.interval=1")
SKIP = "--training.on_nonfinite=skip"
ROLLBACK = ("--training.on_nonfinite=rollback", "--checkpoint.enable", "--checkpoint.interval=2")
SPIKES = ("--training.spike_window=4", "--training.spike_sigmas=20")


def run(folder: Path, *options: str, ranks: int = 1, **env: str) -> Finished:
    return command("train", *POISONED, *options, f"--job.dump_folder={folder}", ranks=ranks, **env)


def lines_of(folder: Path, *options: str, ranks: int = 1, **env: str) -> list[dict]:
    done = run(folder, *options, ranks=ranks, **env)
    assert done.exit_code == 0, done.err
    return read_lines(folder / "metrics.jsonl")


def saved(folder: Path, step: int, part: str) -> dict[str, torch.Tensor]:
    checkpoint = folder / "checkpoint" / f"step-{step}"
    metadata = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if name.startswith(f"{part}.") and hasattr(entry, "size")
    }
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    return state


@pytest.mark.parametrize("flavor", ["tiny", "experts"])
def test_a_skipped_step_changes_nothing(flavor: str, tmp_path: Path) -> None:
    """Neither weights nor optimizer state nor the balance of experts."""
    options = [SKIP, *SAVE_EACH, f"--model.flavor={flavor}", "--training.steps=3"]
    ranks = 1
    if flavor == "experts":
        ranks, options = 2, [*options, "--parallelism.expert_parallel_degree=2"]
    lines = lines_of(tmp_path, *options, ranks=ranks, POISON="3:nan")
    assert [line["step"] for line in lines if line["loss"] is None] == [3]
    assert [line["steps_skipped"] for line in lines] == [0, 0, 1]
    of_a_step = lines[0]["tokens_seen"]
    assert [line["tokens_seen"] for line in lines] == [of_a_step, 2 * of_a_step, 2 * of_a_step]
    assert lines[2]["tokens_per_second"] > 0  # the devices did the work
    for part in "model", "optimizer":
        first, before, after = (saved(tmp_path, step, part) for step in (1, 2, 3))
        assert before and before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before), part
        changed = {name for name in before if not torch.equal(before[name], first[name])}
        assert len(changed) > len(before) / 2
        if flavor == "experts" and part == "model":
            assert any("selection_bias" in name for name in changed)


def test_the_first_step_that_is_taken_is_checked(tmp_path: Path) -> None:
    options = [SKIP, *SAVE_EACH, "--training.steps=2"]
    done = run(tmp_path, *options, POISON="1:nan", SCRATCH="1")
    assert done.exit_code == 2 and "'scratch' of" in done.err and "checkpoints hold" in done.err


LAYOUTS = {
    "accumulation": (1, "--training.local_batch_size=2"),
    "fsdp2": (2,),
    "tp2": (2, "--parallelism.tensor_parallel_degree=2"),
    "pp2": (2, "--parallelism.pipeline_parallel_degree=2", "--training.local_batch_size=8"),
}


@pytest.fixture(scope="module")
def skipped(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("skipped")
    return lines_of(folder, SKIP, "--training.on_spike=skip", *SPIKES, POISON="3:nan 5:1000")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_layouts_skip_the_same_steps(layout: str, skipped: list[dict], tmp_path: Path) -> None:
    ranks, *options = LAYOUTS[layout]
    options += [SKIP, "--training.on_spike=skip", *SPIKES]
    lines = lines_of(tmp_path, *options, ranks=ranks, POISON="3:nan 5:1000")
    assert [line["step"] for line in lines if line["loss"] is None] == [3, 5]
    for line, expected in zip(lines, skipped, strict=True):
        assert line["steps_skipped"] == expected["steps_skipped"]
        if expected["loss"] is not None:
            assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("ranks", "mode", "log_freq", "logged"),
    [
        (1, "disabled", 1, [1, 2, 3, 4, 5, 6]),
        (2, "async", 2, [1, 2, 4, 6]),
        pytest.param(2, "disabled", 1, [1, 2, 3, 4, 5, 6], marks=pytest.mark.long),
        pytest.param(1, "async", 2, [1, 2, 4, 6], marks=pytest.mark.long),
    ],
)
def test_a_rollback_goes_on_with_later_data(
    ranks: int, mode: str, log_freq: int, logged: list[int], tmp_path: Path
) -> None:
    """Back from step 4 to step 2: as a run that never had batches 3 and 4, to the last bit."""
    options = [*ROLLBACK, f"--checkpoint.async_mode={mode}", f"--metrics.log_freq={log_freq}"]
    expected = lines_of(tmp_path / "dropped", *options, ranks=ranks, DROP="3 4")
    lines = lines_of(tmp_path / "run", *options, ranks=ranks, POISON="4:nan")
    assert [line["step"] for line in lines] == logged
    for key in "loss", "max_loss", "grad_norm":
        assert [line.get(key) for line in lines] == [line.get(key) for line in expected]
    assert lines[-1]["rollbacks"] == 1 and lines[-1]["batches_skipped"] == 2
    ours, theirs = newest_weights(tmp_path / "run"), newest_weights(tmp_path / "dropped")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_resumed_after_a_rollback_goes_on_as_if_not_stopped(tmp_path: Path) -> None:
    whole = lines_of(tmp_path / "whole", *ROLLBACK, POISON="4:nan")
    parts = tmp_path / "parts"
    lines_of(parts, *ROLLBACK, "--training.steps=4", "--lr_scheduler.decay_ratio=0", POISON="4:nan")
    lines = lines_of(parts, *ROLLBACK, "--training.steps=6")
    assert lines[-1]["batches_skipped"] == whole[-1]["batches_skipped"] == 2
    assert lines[-1]["data_epoch"] == whole[-1]["data_epoch"]


def test_a_run_stopped_in_a_rollback_does_not_meet_the_bad_batch_again(tmp_path: Path) -> None:
    whole = lines_of(tmp_path / "whole", *ROLLBACK, POISON="4:nan")
    parts = tmp_path / "parts"
    stopped = run(parts, *ROLLBACK, POISON="4:nan", STOP="4", ranks=2)
    assert stopped.exit_code == PREEMPTED, stopped.err
    assert checkpoints_in(parts / "checkpoint") == ["step-2", "step-3"]
    lines = lines_of(parts, *ROLLBACK)
    assert lines[-1]["rollbacks"] == 1 and lines[-1]["batches_skipped"] == 2
    assert lines[-1]["data_epoch"] == whole[-1]["data_epoch"]


def test_batches_left_out_by_hand_are_skipped(skipped: list[dict], tmp_path: Path) -> None:
    """Also after a resume, whose steps go on where the batches do."""
    options = ["--training.skip_batches", "3", "5", "--checkpoint.enable"]
    lines_of(tmp_path, *options, "--training.steps=3", "--lr_scheduler.decay_ratio=0", ranks=2)
    lines = lines_of(tmp_path, *options, ranks=2)
    assert [line["step"] for line in lines if line["loss"] is None] == [3, 5]
    for key in "loss", "grad_norm", "lr", "tokens_seen", "steps_skipped":
        for line, expected in zip(lines, skipped, strict=True):
            assert line[key] == (expected[key] and pytest.approx(expected[key], rel=1e-4)), key


def test_nothing_is_saved_before_a_batch_was_trained_on(tmp_path: Path) -> None:
    """PyTorch makes an optimizer without state step before it is saved: Adam's bias correction."""
    options = ["--training.skip_batches=1", "--training.steps=4", "--checkpoint.enable"]
    often = lines_of(tmp_path / "often", *options, "--checkpoint.interval=1")
    once = lines_of(tmp_path / "once", *options)
    assert [line["loss"] for line in often] == [line["loss"] for line in once]
    saved = {path.name for path in (tmp_path / "often" / "checkpoint").glob("step-*")}
    assert saved == {"step-2", "step-3", "step-4"}


def test_what_is_said_of_a_bad_step(tmp_path: Path) -> None:
    done = run(tmp_path, SKIP, "--training.on_spike=warn", *SPIKES, ranks=2, POISON="3:inf 6:1e5")
    assert done.exit_code == 0, done.err
    assert "step 3, batch 3 of the data: the loss is inf" in done.err
    assert re.search(r"step 6, batch 6 of the data: the loss is \d+, but it was \d", done.err)
    folder = re.search(r"torchtitan data batch (\S+batch-3)$", done.err, re.M).group(1)
    shown = command("data", "batch", folder, "--characters=20")
    assert shown.exit_code == 0, shown.err
    assert [f"--- row {i}: 32 tokens" in shown.out for i in range(9)] == [True] * 8 + [False]


def test_too_many_bad_steps_end_the_run(tmp_path: Path) -> None:
    bad = " ".join(f"{batch}:nan" for batch in range(3, 10))
    done = run(tmp_path / "skip", SKIP, "--training.bad_step_limit=2", POISON=bad)
    assert done.exit_code == 2 and "error: step 5, batch 5" in done.err, done.err
    assert "3 bad steps in a row" in done.err and "Traceback" not in done.err
    options = [*ROLLBACK, "--training.bad_step_limit=2"]
    bad = "4:nan 6:nan 8:nan"
    done = run(tmp_path / "back", *options, POISON=bad, ranks=2)
    assert done.exit_code == 2, done.err
    assert "step 4: 3 rollbacks to the checkpoint of step 2" in done.err, done.err


def test_without_a_checkpoint_a_rollback_is_a_skip(tmp_path: Path) -> None:
    done = run(tmp_path, *ROLLBACK, POISON="1:nan")
    assert done.exit_code == 0 and "no checkpoint to roll back to" in done.err
    assert read_lines(tmp_path / "metrics.jsonl")[-1]["steps_skipped"] == 1


def test_no_checkpoint_is_saved_after_a_bad_step_but_at_the_end(tmp_path: Path) -> None:
    options = ["--checkpoint.enable", "--checkpoint.interval=2"]
    lines_of(tmp_path, SKIP, *options, POISON="4:nan 6:nan")
    assert checkpoints_in(tmp_path / "checkpoint") == ["step-2", "step-6"]


def test_no_checkpoint_of_a_bad_step_is_saved_between_logged_ones(tmp_path: Path) -> None:
    done = run(tmp_path, *SAVE_EACH, "--metrics.log_freq=100", POISON="3:nan")
    assert done.exit_code == 2 and "step 3: the loss is nan" in done.err, done.err
    assert checkpoints_in(tmp_path / "checkpoint") == ["step-1", "step-2"]


def test_a_model_of_nan_is_not_saved_at_the_end(tmp_path: Path) -> None:
    options = ["--optimizer.lr=1e30", "--optimizer.weight_decay=1e30", "--training.steps=2"]
    options += ["--lr_scheduler.warmup_steps=0"]
    done = run(tmp_path, SKIP, *options, "--checkpoint.enable")
    assert done.exit_code == 2 and "so the model is not saved" in done.err, done.err
    assert not list((tmp_path / "checkpoint").glob("step-*"))
