"""Runs whose global batch grows: the same on each layout, after a resume, and after a rollback."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from equality import SAVE, assert_equal_runs
from harness import command, read_lines, train
from tiny_llama import OPTIONS

RAMP = (*OPTIONS, "--training.steps=7", "--training.global_batch_size=8", *SAVE)
RAMP += ("--training.batch_size_ramp", "2:2", "6:4", "--checkpoint.interval=2")
STOP = ("--training.steps=3", "--lr_scheduler.total_steps=7")
SIZES = [2, 2, 6, 6, 8, 8, 8]
LAYOUTS = {
    "accumulation": (1, 1),
    "fsdp2": (2, 1),
    "pp2": (2, 2, "--parallelism.pipeline_parallel_degree=2"),
    "tp2": (2, 2, "--parallelism.tensor_parallel_degree=2"),
}


def run(folder: Path, layout: tuple, *options: str) -> list[dict]:
    ranks, local_batch_size, *own = layout
    local = f"--training.local_batch_size={local_batch_size}"
    return train(folder, *RAMP, local, *own, *options, ranks=ranks)


def sizes(lines: list[dict]) -> list[float]:
    tokens = [line["tokens_seen"] for line in lines]
    return [(now - before) / 32 for before, now in pairwise([0, *tokens])]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run(folder, (1, 2))
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_does_not_matter(name: str, whole: Path, tmp_path: Path) -> None:
    lines = run(tmp_path, LAYOUTS[name])
    assert_equal_runs(tmp_path, whole)
    assert sizes(lines) == SIZES


def test_a_run_that_stops_in_the_ramp_goes_on_as_if_it_had_not(whole: Path, tmp_path: Path) -> None:
    """Step 3 ends within the rows of the batch; bit for bit, on the layout of the whole run."""
    same, other = tmp_path / "same", tmp_path / "other"
    run(same, (1, 2), *STOP)
    expected = read_lines(whole / "metrics.jsonl")
    keys = ("loss", "grad_norm", "lr", "tokens_seen", "data_epoch")
    for line, wanted in zip(run(same, (1, 2)), expected, strict=True):
        assert [line[key] for key in keys] == [wanted[key] for key in keys]
    run(other, LAYOUTS["fsdp2"], *STOP)
    run(other, (1, 1))
    assert_equal_runs(other, whole)


def test_resuming_with_other_sizes_is_a_ramp(tmp_path: Path) -> None:
    """After 4 steps of 2, each row of the batch of 8 has had one sequence."""
    ramp, parts = "--training.batch_size_ramp=2:4", tmp_path / "parts"
    run(tmp_path / "whole", (1, 2), ramp)
    run(parts, (1, 2), "--training.batch_size_ramp=2:6", "--training.steps=4", STOP[1])
    train(parts, *RAMP, "--training.local_batch_size=2", "--training.batch_size_ramp")
    assert_equal_runs(parts, tmp_path / "whole")


def test_a_phase_begins_with_its_step_also_after_a_resume_with_another_ramp(
    tmp_path: Path,
) -> None:
    text, config = tmp_path / "text.txt", tmp_path / "mixture.toml"
    text.write_text("A text.\n" * 1000)
    source = '[[data.sources]]\nname = "{}"\ndataset = "text"\ndataset_path = "{}"\nweight = {}\n'
    phase = "[[data.phases]]\nfrom_step = 6\nweights = [0.0, 1.0]\n"
    config.write_text(source.format("a", text, 1.0) + source.format("b", text, 0.0) + phase)
    given = f"--job.config_file={config}"
    run(tmp_path / "run", (1, 2), given, "--training.batch_size_ramp=2:7", "--training.steps=4")
    lines = run(tmp_path / "run", (1, 2), given, "--training.batch_size_ramp")
    drawn = [line["data_tokens/b"] / 32 for line in lines]
    assert drawn == [0] * 5 + [8, 16]


def test_after_a_rollback_a_step_keeps_its_size(tmp_path: Path) -> None:
    """Sequences 9 to 16 are bad: step 3 begins in them, and twice goes back to step 2."""
    poisoned = ("--job.custom_import=poisoned_llama", "--model.name=poisoned_llama")
    options = (*RAMP, *poisoned, "--training.on_nonfinite=rollback")
    for name, ranks, local in ("one", 1, 2), ("fsdp2", 2, 1):
        folder = f"--job.dump_folder={tmp_path / name}"
        local_batch_size = f"--training.local_batch_size={local}"
        done = command("train", *options, local_batch_size, folder, ranks=ranks, POISON="2:nan")
        assert done.exit_code == 0, done.err
        assert "step 5: the global batch grows to 8 sequences" in done.err
        lines = read_lines(tmp_path / name / "metrics.jsonl")
        assert sizes(lines) == SIZES and lines[-1]["batches_skipped"] == 2
    assert_equal_runs(tmp_path / "fsdp2", tmp_path / "one")
