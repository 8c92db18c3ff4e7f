"""Which configs may be compared."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path

import pytest
from run_folder import write_config, write_run

from torchtitan.commands.converge.match import (
    HOW,
    WHAT,
    check_match,
    differences,
    may_differ,
    warn_of_repeats,
)
from torchtitan.commands.converge.runs import Run, plan_runs
from torchtitan.config import JobConfig
from torchtitan.errors import ConfigError


def pair(tmp_path: Path, *options: str) -> list[Run]:
    """A control, and a test that has these options besides."""
    control = write_config(tmp_path / "control.toml")
    test = write_config(tmp_path / "test.toml", *options)
    return plan_runs([str(control), str(test)], tmp_path / "runs", [], [])


def check(tmp_path: Path, *options: str, allowed: tuple[str, ...] = ()) -> None:
    control, test = pair(tmp_path, *options)
    check_match(control, [test], allowed)


@pytest.mark.parametrize(
    "options",
    [
        ["--parallelism.tensor_parallel_degree=2"],
        ["--parallelism.data_parallel_shard_degree=2"],
        ["--training.local_batch_size=1"],
        ["--activation_checkpoint.mode=full"],
        ["--compile.enable", "--compile.backend=eager"],
        ["--training.mixed_precision_param=bfloat16"],
        ["--loss.name=chunked_cross_entropy"],
        ["--validation.enable", "--metrics.enable_tensorboard"],
        ["--data.workers=4", "--data.verify_hashes"],
        ["--training.replay_freq=2"],
    ],
)
def test_how_a_run_computes_may_differ(tmp_path: Path, options: list[str]) -> None:
    check(tmp_path, *options)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("debug.seed", "7", r"debug.seed = 42 in \S*control.toml, 7 in \S*test.toml"),
        ("training.global_batch_size", "8", "training.global_batch_size = 4 in .*, 8 in"),
        ("training.seq_len", "32", "training.seq_len = 64 in .*, 32 in"),
        ("training.steps", "4", "training.steps = 3 in .*, 4 in"),
        ("training.dataset", "stdlib_validation", 'training.dataset = "stdlib" in .*, "stdlib_v'),
        ("training.document_mask", "true", "training.document_mask = false in .*, true in"),
        ("optimizer.lr", "1e-3", "optimizer.lr = 0.0008 in .*, 0.001 in"),
        ("lr_scheduler.decay_ratio", "0.5", "lr_scheduler.decay_ratio = unset in .*, 0.5 in"),
        ("loss.z_loss_weight", "0.1", "loss.z_loss_weight = 0.0 in .*, 0.1 in"),
        ("model.flavor", "150M", 'model.flavor = "debugmodel" in .*, "150M" in'),
    ],
)
def test_what_a_run_computes_must_match_unless_allowed(
    tmp_path: Path, key: str, value: str, expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        check(tmp_path, f"--{key}={value}")
    assert f"--allow-different {key}" in str(caught.value)
    check(tmp_path, f"--{key}={value}", allowed=(key,))
    check(tmp_path, f"--{key}={value}", allowed=(key.partition(".")[0],))


def test_all_differing_keys_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check(tmp_path, "--debug.seed=7", "--optimizer.lr=1e-3", allowed=("optimizer.beta1",))
    assert "debug.seed" in str(caught.value)
    assert "optimizer.lr" in str(caught.value)


def test_the_resolved_batch_counts(tmp_path: Path) -> None:
    """-1 means another batch on two ranks, whatever the files say."""
    path = write_config(tmp_path / "one.toml", "--training.global_batch_size=-1")
    control, test = plan_runs([str(path), str(path)], tmp_path / "runs", ["one-2=2"], [])
    with pytest.raises(ConfigError, match=r"global_batch_size = 2 in .*, 4 in") as caught:
        check_match(control, [test], [])
    assert "-1 stands for local_batch_size x data ranks" in str(caught.value)


def test_a_finished_run_must_match_too(tmp_path: Path) -> None:
    control = write_run(tmp_path / "old", [3.0, 2.0, 1.0])
    test = write_config(tmp_path / "test.toml")
    runs = plan_runs([str(control), str(test)], tmp_path / "runs", [], ["--training.seq_len=32"])
    with pytest.raises(ConfigError, match=r"training.seq_len = 64 in \S*old, 32 in"):
        check_match(runs[0], runs[1:], [])


def test_weights_to_start_from_must_match(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.initial_load_path"):
        check(tmp_path, f"--checkpoint.initial_load_path={tmp_path}")


def test_a_job_that_branches_begins_at_step_1_with_the_weights(tmp_path: Path) -> None:
    job = tmp_path / "job.toml"
    job.write_text(
        f'[checkpoint]\ninitial_load_path = "{tmp_path}"\ninitial_load_model_only = false\n'
    )
    [run] = plan_runs([str(job)], tmp_path / "runs", [], [])
    assert run.config.checkpoint.initial_load_model_only
    assert run.config.checkpoint.initial_load_path == str(tmp_path)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("optimizer.lrr", "no such key. Did you mean 'optimizer.lr'?"),
        ("optimiser", "no such key. Did you mean 'optimizer'?"),
    ],
)
def test_unknown_allowed_key(tmp_path: Path, key: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(tmp_path, allowed=(key,))


def test_the_lists_name_keys_that_exist() -> None:
    config = asdict(JobConfig())
    for name in (*HOW, *WHAT):
        section, _, key = name.partition(".")
        assert section in config
        assert not key or key in config[section]


def test_a_key_that_nobody_classified_must_match() -> None:
    assert not may_differ("my_section.my_key")


def test_differences_show_each_value_once_per_run(tmp_path: Path) -> None:
    runs = pair(tmp_path, "--parallelism.tensor_parallel_degree=2", "--debug.seed=7")
    assert differences(runs) == {
        "parallelism.tensor_parallel_degree": ["1", "2"],
        "debug.seed": ["42", "7"],
    }


def test_a_test_that_is_the_control_again_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    control, same = pair(tmp_path)
    with caplog.at_level(logging.WARNING, logger="torchtitan"):
        warn_of_repeats(control, [same])
        assert "test has the same config and layout as control" in caplog.text
        caplog.clear()
        same.processes = 2
        warn_of_repeats(control, [same])
        assert caplog.text == ""
