"""Runs that were stopped or killed go on exactly, on their layout and on others."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from harness import checkpoints_in, command, read_lines, train
from tiny_llama import OPTIONS

from torchtitan.runtime.stop_request import PREEMPTED

SAVING = ("--checkpoint.enable", "--checkpoint.interval=2")
TP2 = "--parallelism.tensor_parallel_degree=2"


def numbers(lines: list[dict]) -> list[tuple[int, float, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in lines]


def steps_saved(folder: Path) -> list[str]:
    return checkpoints_in(folder / "checkpoint")


LAYOUTS = {
    "one": (1, "--training.local_batch_size=8"),
    "one_accumulation": (1, "--training.local_batch_size=2"),
    "one_async": (1, "--checkpoint.async_mode=async"),
    "fsdp2_async": (2, "--checkpoint.async_mode=async"),
    "tp2_accumulation": (2, TP2),
}


@pytest.mark.parametrize(
    "layout",
    [
        *("one", "one_async", "fsdp2_async", "tp2_accumulation"),
        pytest.param("one_accumulation", marks=pytest.mark.long),
    ],
)
def test_a_resumed_run_is_equal_bit_for_bit(layout: str, tmp_path: Path) -> None:
    ranks, option = LAYOUTS[layout]
    arguments = (*OPTIONS, option)
    whole = train(tmp_path / "whole", *arguments, ranks=ranks)
    parts = tmp_path / "parts"
    assert numbers(train(parts, *arguments, *SAVING, ranks=ranks)) == numbers(whole)
    assert steps_saved(parts) == ["step-2", "step-4", "step-6"]
    shutil.rmtree(parts / "checkpoint" / "step-6")
    shutil.rmtree(parts / "checkpoint" / "step-4")
    assert numbers(train(parts, *arguments, *SAVING, ranks=ranks)) == numbers(whole)


def test_a_run_goes_on_from_layout_to_layout(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", *OPTIONS)
    parts = tmp_path / "parts"
    train(parts, *OPTIONS, *SAVING, ranks=2)
    shutil.rmtree(parts / "checkpoint" / "step-6")
    shutil.rmtree(parts / "checkpoint" / "step-4")
    train(parts, *OPTIONS, *SAVING, TP2, ranks=2)
    shutil.rmtree(parts / "checkpoint" / "step-6")
    lines = train(parts, *OPTIONS, *SAVING)
    for line, expected in zip(numbers(lines), numbers(whole), strict=True):
        assert line == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("ranks", "signalled"), [(1, 0), (2, 1)])
@pytest.mark.parametrize(
    "signal",
    ["SIGTERM", *(pytest.param(name, marks=pytest.mark.long) for name in ("SIGUSR1", "SIGINT"))],
)
def test_a_signal_to_one_rank_ends_the_step_and_saves(
    signal: str, ranks: int, signalled: int, tmp_path: Path
) -> None:
    interrupted = ("--job.custom_import=interrupted_llama", "--model.name=interrupted_llama")
    arguments = (*OPTIONS, *interrupted, "--checkpoint.enable", "--checkpoint.interval=100")
    whole = train(tmp_path / "whole", *OPTIONS, ranks=ranks)
    folder = tmp_path / "parts"
    done = command(
        "train",
        *arguments,
        f"--job.dump_folder={folder}",
        ranks=ranks,
        INTERRUPT=f"{signal} 3 {signalled}",
    )
    assert set(done.exit_codes) == {PREEMPTED}, done.err
    assert f"{signal}: stopping after this step" in done.err
    assert steps_saved(folder) == ["step-3"]
    assert numbers(read_lines(folder / "metrics.jsonl")) == numbers(whole)[:3]
    assert numbers(train(folder, *arguments, ranks=ranks)) == numbers(whole)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_is_stopped_without_checkpoints_is_not_to_be_tried_again(
    ranks: int, tmp_path: Path
) -> None:
    interrupted = ("--job.custom_import=interrupted_llama", "--model.name=interrupted_llama")
    folder = f"--job.dump_folder={tmp_path}"
    env = {"INTERRUPT": "SIGTERM 3 0"}
    done = command("train", *OPTIONS, *interrupted, folder, ranks=ranks, **env)
    assert set(done.exit_codes) == {2}, done.err
    assert "stopped after step 3 of 6" in done.err and "checkpoint.enable is false" in done.err


VALIDATION = ("--validation.enable", "--validation.freq=3", "--validation.steps=1")


def test_a_run_that_is_to_stop_saves_before_it_validates(tmp_path: Path) -> None:
    interrupted = ("--job.custom_import=interrupted_llama", "--model.name=interrupted_llama")
    seldom = "--metrics.log_freq=5"
    arguments = (*OPTIONS, *interrupted, "--checkpoint.enable", *VALIDATION, seldom)
    folder = f"--job.dump_folder={tmp_path}"
    done = command("train", *arguments, folder, INTERRUPT="SIGTERM 3 0")
    assert done.exit_code == PREEMPTED, done.err
    assert steps_saved(tmp_path) == ["step-3"]
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 3]
    assert not (tmp_path / "validation.jsonl").is_file(), done.err
    done = command("train", *arguments, folder, INTERRUPT="SIGTERM 3 0")  # of those that are left
    assert done.exit_code == 0, done.err
    assert [line["step"] for line in read_lines(tmp_path / "validation.jsonl")] == [6]
    assert done.err.index("saved") < done.err.index("validation after step 6")


def test_an_export_starts_a_new_run(tmp_path: Path) -> None:
    saving = ("--checkpoint.enable", "--checkpoint.interval=100")
    full, export = tmp_path / "full", tmp_path / "export"
    first = train(full, *OPTIONS, *saving, ranks=2)
    train(export, *OPTIONS, *saving, "--checkpoint.last_save_model_only", ranks=2)
    starts = [
        train(
            tmp_path / f"from_{folder.name}",
            *OPTIONS,
            f"--checkpoint.initial_load_path={folder}/checkpoint/step-6",
        )
        for folder in (full, export)
    ]
    assert numbers(starts[0]) == numbers(starts[1])
    assert starts[0][0]["loss"] < first[0]["loss"] - 0.5
    done = command("train", *OPTIONS, *saving, f"--job.dump_folder={export}")
    assert done.exit_code == 2 and "cannot resume a run" in done.err


@pytest.mark.parametrize(
    ("ranks", "option"),
    [
        (2, TP2),
        pytest.param(2, "--parallelism.pipeline_parallel_degree=2", marks=pytest.mark.long),
        pytest.param(1, "--data.workers=1", marks=pytest.mark.long),
    ],
    ids=["tp2", "pp2", "one"],
)
def test_a_branch_is_equal_bit_for_bit_to_a_run_whose_checkpoint_was_copied(
    ranks: int, option: str, tmp_path: Path
) -> None:
    """On another layout than its parent's, with another schedule."""
    parent, copied, branched = (tmp_path / name for name in ("parent", "copied", "branched"))
    train(parent, *OPTIONS, *SAVING, ranks=2)
    step = parent / "checkpoint" / "step-4"
    shutil.copytree(step, copied / "checkpoint" / "step-4")
    start = (f"--checkpoint.initial_load_path={step}", "--checkpoint.initial_load_model_only=false")
    cooldown = ("--training.steps=8", "--lr_scheduler.decay_ratio=0.5", "--optimizer.lr=5e-3")
    arguments = (*OPTIONS, *SAVING, *cooldown, option)
    expected = train(copied, *arguments, ranks=ranks)
    assert [line["step"] for line in expected] == [5, 6, 7, 8]
    branched.mkdir()
    (branched / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')  # of another run
    lines = train(branched, *arguments, *start, ranks=ranks)
    assert numbers(lines) == numbers(expected)
    assert [line["tokens_seen"] for line in lines] == [line["tokens_seen"] for line in expected]
    assert len(read_lines(branched / "metrics.jsonl.1")) == 1
    assert steps_saved(branched) == ["step-6", "step-8"]
    ends = (str(folder / "checkpoint" / "step-8") for folder in (copied, branched))
    difference = command("checkpoint", "diff", *ends)
    assert "initial_load_path" in difference.out
    assert " 0 differ; fields: " in difference.out, difference.out
    shutil.rmtree(branched / "checkpoint" / "step-8")  # a scheduler starts it again
    assert numbers(train(branched, *arguments, *start, ranks=ranks)) == numbers(expected)
    assert steps_saved(parent) == ["step-2", "step-4", "step-6"]


def test_a_branch_may_have_other_data(tmp_path: Path) -> None:
    """Its steps are counted on, and its data begin anew. One that saves nothing may branch too."""
    parent, branched = tmp_path / "parent", tmp_path / "branched"
    train(parent, *OPTIONS, *SAVING)
    (tmp_path / "notes.txt").write_text("some other notes of mine\n" * 400)
    lines = train(
        branched,
        *OPTIONS,
        "--training.dataset=text",
        f"--training.dataset_path={tmp_path}/notes.txt",
        "--training.steps=5",
        f"--checkpoint.initial_load_path={parent}/checkpoint/step-4",
        "--checkpoint.initial_load_model_only=false",
        "--checkpoint.exclude_from_loading=dataloader",
    )
    assert [line["step"] for line in lines] == [5]
    assert lines[0]["tokens_seen"] == 5 * 8 * 32
    assert not (branched / "checkpoint").exists()


def test_only_the_latest_checkpoints_are_kept(tmp_path: Path) -> None:
    options = ("--checkpoint.enable", "--checkpoint.interval=1", "--checkpoint.keep_latest_k=2")
    train(tmp_path, *OPTIONS, *options)
    assert steps_saved(tmp_path) == ["step-5", "step-6"]


def test_tokens_are_counted_on_from_a_step_that_was_not_logged(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", *OPTIONS)
    seldom = (*OPTIONS, *SAVING, "--metrics.log_freq=5")
    train(tmp_path / "parts", *seldom)
    for step in (4, 6):
        shutil.rmtree(tmp_path / "parts" / "checkpoint" / f"step-{step}")
    lines = train(tmp_path / "parts", *seldom)
    assert [line["step"] for line in lines][-2:] == [5, 6]
    assert lines[-1]["tokens_seen"] == whole[-1]["tokens_seen"]
