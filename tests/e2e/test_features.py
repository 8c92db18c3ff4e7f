"""Options of a run: what they must not change, and what they write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness import command, read_lines, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_llama import OPTIONS

from torchtitan.config import load_config

AC = "--activation_checkpoint.mode"
EAGER = ("--compile.enable", "--compile.backend=aot_eager")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return train(tmp_path_factory.mktemp("plain"), *OPTIONS)


def losses(lines: list[dict]) -> list[float]:
    return [line["loss"] for line in lines]


SAME = {
    "ac_full": (1, f"{AC}=full"),
    "ac_op": (1, f"{AC}=selective"),
    "ac_layer": (1, f"{AC}=selective", "--activation_checkpoint.selective_ac_option=2"),
    "ac_budget": (1, f"{AC}=memory_budget", *EAGER),
    "compile_block": (1, *EAGER),
    "compile_model": (1, *EAGER, "--compile.scope=model"),
    "offload": (2, "--training.enable_cpu_offload"),
    "gc": (1, "--training.gc_freq=1"),
    "no_gc": (1, "--training.gc_freq=0"),
    "deterministic": (1, "--debug.deterministic"),
}


@pytest.mark.parametrize("option", SAME)
def test_an_option_does_not_change_the_losses(
    option: str, plain: list[dict], tmp_path: Path
) -> None:
    ranks, *options = SAME[option]
    lines = train(tmp_path, *OPTIONS, *options, ranks=ranks)
    assert losses(lines) == pytest.approx(losses(plain), rel=1e-4)


TOLD = {
    "one": (1, "--training.replay_freq=1"),
    "fsdp": (2, "--validation.enable", "--validation.freq=1", "--validation.steps=1"),
    "tp": (2, "--parallelism.tensor_parallel_degree=2"),
    "cp": (2, "--parallelism.context_parallel_degree=2"),
    "pp": (2, "--parallelism.pipeline_parallel_degree=2"),
}


@pytest.mark.parametrize("layout", TOLD)
def test_what_a_loss_tells_is_of_the_steps_of_training_on_all_ranks(
    layout: str, tmp_path: Path
) -> None:
    """Neither of evaluation nor, in a pipeline, of the pass that finds out shapes."""
    ranks, *options = TOLD[layout]
    own = "--job.custom_import=own_parts_llama", "--model.name=own_loss_tells"
    lines = train(tmp_path, *OPTIONS, *own, *options, ranks=ranks)
    assert [line["loss_main"] for line in lines] == pytest.approx(losses(lines), rel=1e-6)


def test_bfloat16_trains_like_float32_on_float32_weights(plain: list[dict], tmp_path: Path) -> None:
    options = ("--training.mixed_precision_param=bfloat16", "--checkpoint.enable")
    for ranks in 1, 2:
        folder = tmp_path / str(ranks)
        lines = train(folder, *OPTIONS, *options, ranks=ranks)
        assert losses(lines) == pytest.approx(losses(plain), rel=2e-2)
        assert losses(lines) != losses(plain)
        metadata = torch.distributed.checkpoint.FileSystemReader(
            folder / "checkpoint" / "step-6"
        ).read_metadata()
        tensors = {
            key: value.properties.dtype
            for key, value in metadata.state_dict_metadata.items()
            if key.startswith(("model.", "optimizer.state.")) and hasattr(value, "properties")
        }
        assert tensors and set(tensors.values()) == {torch.float32}


def test_validation_is_the_same_on_one_and_two_ranks(tmp_path: Path) -> None:
    options = "--validation.enable --validation.freq=2 --validation.steps=4 --validation.seq_len=32"
    runs = []
    for ranks in 1, 2:
        folder = tmp_path / str(ranks)
        train(folder, *OPTIONS, *options.split(), ranks=ranks)
        runs.append(read_lines(folder / "validation.jsonl"))
    assert [line["step"] for line in runs[0]] == [2, 4, 6]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-4)


def test_what_a_run_writes(tmp_path: Path) -> None:
    options = ("--metrics.enable_tensorboard", "--profiling.enable_profiling")
    lines = train(tmp_path, *OPTIONS, *options, "--profiling.profile_freq=3")
    keys = {"step", "loss", "grad_norm", "lr", "tokens_per_second", "peak_memory_bytes"}
    assert all(keys <= line.keys() for line in lines)
    assert "mfu" not in lines[0]
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(losses(lines))
    for step in 3, 6:
        assert (tmp_path / "profile" / f"step-{step}" / "rank-0.json.gz").stat().st_size > 1000


def test_the_resolved_config_repeats_the_run(plain: list[dict], tmp_path: Path) -> None:
    printed = command("train", *OPTIONS, "--job.print_config")
    train(tmp_path / "first", *OPTIONS)
    resolved = tmp_path / "first" / "config.resolved.toml"
    (tmp_path / "printed.toml").write_text(printed.out)
    ours, theirs = (
        load_config(["--job.config_file", str(path), "--job.dump_folder=x"])
        for path in (resolved, tmp_path / "printed.toml")
    )
    ours.job.config_file = theirs.job.config_file = None
    assert ours == theirs
    # And with the key in it that upstream's files have, which prints and trains.
    resolved.write_text(resolved.read_text().replace("[job]\n", "[job]\nprint_config = true\n"))
    words = "--job.config_file", str(resolved), f"--job.dump_folder={tmp_path}/again"
    again = command("train", *words)
    assert again.exit_code == 0, again.err
    assert losses(read_lines(tmp_path / "again" / "metrics.jsonl")) == losses(plain)
    assert "[training]\n" in again.out


def test_an_ordinary_run_says_nothing_but_its_log(tmp_path: Path) -> None:
    for ranks in 1, 2:
        done = command("train", *OPTIONS, f"--job.dump_folder={tmp_path}/{ranks}", ranks=ranks)
        assert done.exit_code == 0 and done.out == ""
        lines = done.err.splitlines()
        assert lines and all(line.startswith("20") for line in lines), done.err
