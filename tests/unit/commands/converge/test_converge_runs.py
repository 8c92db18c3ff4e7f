"""What is compared: names, processes, configs, finished runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_folder import write_config, write_run

from torchtitan.commands.converge.runs import FORCED, plan_runs, unique_names
from torchtitan.config.parallelism import Parallelism
from torchtitan.errors import ConfigError

TP2 = "--parallelism.tensor_parallel_degree=2"


def plan(*arguments: Path | str, out: Path, nproc: tuple[str, ...] = (), overrides=()):
    return plan_runs([str(a) for a in arguments], out, nproc, overrides)


def test_names_are_those_of_files_and_folders_and_unique(tmp_path: Path) -> None:
    arguments = ["a/tp2.toml", "b/tp2.toml", str(tmp_path / "old"), "tp2.toml"]
    assert unique_names(arguments) == ["tp2", "tp2-2", "old", "tp2-3"]


@pytest.mark.parametrize(
    ("degrees", "processes"),
    [
        ({}, 1),
        ({"tensor_parallel_degree": 2}, 2),
        ({"data_parallel_shard_degree": 4}, 4),
        ({"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 3}, 6),
        ({"pipeline_parallel_degree": 2, "context_parallel_degree": 2}, 4),
        ({"data_parallel_shard_degree": 4, "expert_parallel_degree": 2}, 4),
    ],
)
def test_default_world_is_the_smallest_that_the_degrees_allow(
    degrees: dict[str, int], processes: int
) -> None:
    assert Parallelism(**degrees).smallest_world == processes


def test_a_planned_run_has_its_layout_batch_and_forced_options(tmp_path: Path) -> None:
    saving = ("--checkpoint.enable", "--checkpoint.last_save_in_hf")
    path = write_config(tmp_path / "tp2.toml", TP2, "--metrics.log_freq=7", *saving)
    (run,) = plan(path, out=tmp_path / "runs", overrides=("--training.steps", "5"))
    assert (run.name, run.processes, run.layout) == ("tp2", 2, "dp_shard 1, tp 2")
    assert (run.global_batch_size, run.folder) == (4, tmp_path / "runs" / "tp2")
    assert run.config.training.steps == 5
    assert run.config.metrics.log_freq == 1
    assert not run.config.checkpoint.enable
    for key, value in FORCED.items():
        assert f"--{key}={value}" in run.options
    assert not run.finished


def test_a_rollback_is_a_skip_since_nothing_is_saved(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        '[checkpoint]\nenable = true\n[training]\non_spike = "rollback"\n'
        'mixed_precision_param = "float32"\n'
    )
    (run,) = plan(path, out=tmp_path, overrides=["--training.on_nonfinite=rollback"])
    assert (run.config.training.on_spike, run.config.training.on_nonfinite) == ("skip", "skip")
    assert {"--training.on_spike=skip", "--training.on_nonfinite=skip"} <= set(run.options)


def test_nproc_names_a_run_or_a_file(tmp_path: Path) -> None:
    path = write_config(tmp_path / "one.toml", "--training.local_batch_size=1")
    by_name = plan(path, path, out=tmp_path / "runs", nproc=("one-2=4",))
    assert [run.processes for run in by_name] == [1, 4]
    assert by_name[1].layout == "dp_shard 4"
    by_file = plan(path, path, out=tmp_path / "runs", nproc=(f"{path}=2",))
    assert [run.processes for run in by_file] == [2, 2]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("one=0", "must be NAME=N"),
        ("one=two", "must be NAME=N"),
        ("one", "must be NAME=N"),
        ("ome=2", "no such run. Did you mean 'one'?"),
        ("one=3", "must be a multiple of"),  # the batch of 4
    ],
)
def test_wrong_nproc(tmp_path: Path, word: str, message: str) -> None:
    path = write_config(tmp_path / "one.toml")
    with pytest.raises(ConfigError, match=message):
        plan(path, out=tmp_path / "runs", nproc=(word,))


def test_a_mistake_in_any_config_is_found_before_a_job_starts(tmp_path: Path) -> None:
    good = write_config(tmp_path / "good.toml")
    bad = write_config(tmp_path / "bad.toml", "--model.flavor=huge")
    with pytest.raises(ConfigError, match="llama3 has no such flavor"):
        plan(good, bad, out=tmp_path / "runs")


@pytest.mark.parametrize(
    "words", [["--job.dump_folder", "x"], ["--metrics.log_freq=2"], ["--job.config_file=x.toml"]]
)
def test_options_that_converge_sets_are_refused(tmp_path: Path, words: list[str]) -> None:
    path = write_config(tmp_path / "one.toml")
    with pytest.raises(ConfigError, match="converge sets it"):
        plan(path, out=tmp_path / "runs", overrides=words)


def test_finished_run_tells_its_processes_and_batch(tmp_path: Path) -> None:
    folder = write_run(
        tmp_path / "old", [3.0, 2.0, 1.0], "--training.global_batch_size=-1", processes=2
    )
    (run,) = plan(folder, out=tmp_path / "runs")
    assert run.finished
    assert (run.name, run.processes, run.layout) == ("old", 2, "dp_shard 2")
    assert run.global_batch_size == 4


def test_finished_run_whose_first_step_was_skipped_tells_its_batch(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "old", [3.0, 2.0, 1.0], "--training.global_batch_size=-1")
    text = (folder / "metrics.jsonl").read_text()
    for step in (1, 2, 3):
        text = text.replace(f'"tokens_seen": {step * 256}', f'"tokens_seen": {(step - 1) * 256}')
    (folder / "metrics.jsonl").write_text(text)
    (run,) = plan(folder, out=tmp_path / "runs")
    assert run.global_batch_size == 4


def test_finished_run_that_did_not_log_every_step(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "old", [3.0, 2.0, 1.0], "--metrics.log_freq=10")
    with pytest.raises(ConfigError, match=r"log_freq = 10.*--metrics.log_freq 1"):
        plan(folder, out=tmp_path / "runs")


@pytest.mark.parametrize("file", ["config.resolved.toml", "metrics.jsonl"])
def test_folder_that_is_no_run(tmp_path: Path, file: str) -> None:
    folder = write_run(tmp_path / "old", [3.0, 2.0, 1.0])
    (folder / file).unlink()
    with pytest.raises(ConfigError, match=f"it has no {file}"):
        plan(folder, out=tmp_path / "runs")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml: no such file or folder"):
        plan(tmp_path / "nowhere.toml", out=tmp_path / "runs")


def test_options_and_nproc_for_finished_runs_are_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "old", [3.0, 2.0, 1.0])
    with pytest.raises(ConfigError, match=r"old=2: .* is a finished run"):
        plan(folder, out=tmp_path / "runs", nproc=("old=2",))
    with pytest.raises(ConfigError, match=r"--training\.steps=2: .* all runs are finished"):
        plan(folder, out=tmp_path / "runs", overrides=["--training.steps=2"])


def test_a_finished_run_is_never_overwritten(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "runs" / "a-2", [3.0, 2.0, 1.0])
    first = write_config(tmp_path / "a.toml")
    second = write_config(tmp_path / "b" / "a.toml")
    with pytest.raises(ConfigError, match="would overwrite the finished run"):
        plan(first, second, folder, out=tmp_path / "runs")
