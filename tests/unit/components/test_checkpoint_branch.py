"""A run goes on from a checkpoint of another run as if it had been copied into its own folder."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import fsspec
import pytest
from checkpoint_run import Run, TinyArgs, world_of_one  # noqa: F401

from torchtitan.components.checkpoint.resume import check_resume
from torchtitan.errors import CheckpointError, ConfigError

PARTS = ["optimizer", "lr_scheduler", "dataloader", "train_state"]


def branch(folder: Path, parent: Path | str, **options: Any) -> Run:
    start = {"initial_load_path": str(parent), "initial_load_model_only": False}
    return Run(folder, seed=1, **(start | options))


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    Run(tmp_path / "a").train(2)
    return tmp_path / "a" / "checkpoint" / "step-2"


def steps_in(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoint").glob("step-*"))


def test_a_branch_goes_on_with_all_of_the_state_and_saves_into_its_own_folder(
    tmp_path: Path, parent: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "torchtitan")
    expected = Run(tmp_path / "whole", enable=False).train(6)
    run = branch(tmp_path / "b", parent)
    check_resume(run.config, TinyArgs())
    assert run.manager.load() == run.state.step == 2 and run.manager.branched
    assert f"branched from {parent}. The configuration has changed" in caplog.text
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    assert run.train(6) == expected[2:]
    assert steps_in(tmp_path / "b") == ["step-4", "step-6"]
    assert steps_in(tmp_path / "a") == ["step-2"]


def test_a_branch_that_has_saved_resumes_from_its_own_checkpoints(
    tmp_path: Path, parent: Path
) -> None:
    run = branch(tmp_path / "b", parent)
    run.manager.load()
    expected = run.train(6)
    (tmp_path / "b" / "checkpoint" / "step-6").rename(tmp_path / "gone")
    parent.rename(tmp_path / "moved")
    again = branch(tmp_path / "b", parent)
    check_resume(again.config, TinyArgs())
    assert again.manager.load() == 4 and not again.manager.branched
    assert again.train(6) == expected[2:]


@pytest.mark.parametrize("part", PARTS)
def test_parts_that_the_parent_has_reset_too_are_reset_in_a_branch_once(
    tmp_path: Path, part: str
) -> None:
    Run(tmp_path / "a", exclude_from_loading=[part]).train(2)
    run = branch(
        tmp_path / "b", tmp_path / "a" / "checkpoint" / "step-2", exclude_from_loading=[part]
    )
    run.manager.load()
    assert run.loaded_parts() == {name: name != part for name in PARTS}
    expected = run.train(run.state.step + 4)
    saved = run.state.step - 2
    (tmp_path / "b" / "checkpoint" / f"step-{saved + 2}").rename(tmp_path / "gone")
    again = branch(tmp_path / "b", "elsewhere/step-2", exclude_from_loading=[part])
    assert again.manager.load() == saved
    assert again.train(saved + 2) == expected[2:]


@pytest.mark.parametrize("scheme", ["memory", "local"])
def test_a_branch_from_a_storage(tmp_path: Path, scheme: str) -> None:
    url = f"{scheme}://{tmp_path}/bucket/a"
    expected = Run(tmp_path / "whole", enable=False).train(4)
    Run(tmp_path / "a", folder=url).train(2)
    run = branch(tmp_path / "b", f"{url}/step-2", enable=False)
    check_resume(run.config, TinyArgs())
    assert run.manager.load() == 2
    assert run.train(4) == expected[2:]
    fsspec.filesystem("memory").store.clear()


def test_a_branch_rolls_back_to_what_it_began_with(
    tmp_path: Path, parent: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = Run(tmp_path / "whole", enable=False).train(4)
    run = branch(tmp_path / "b", parent.rename(parent.with_name("stable")), interval=4)
    run.manager.load()
    assert run.train(3) == expected[2:3]
    assert run.manager.roll_back() == 2
    assert run.train(4) == expected[2:]
    assert run.manager.newest() == tmp_path / "b" / "checkpoint" / "step-4"
    assert "has no effect" not in caplog.text


def test_a_branch_needs_more_than_a_model(tmp_path: Path) -> None:
    Run(tmp_path / "a", steps=2, last_save_model_only=True).train(2, last=True)
    run = branch(tmp_path / "b", tmp_path / "a" / "checkpoint" / "step-2")
    with pytest.raises(CheckpointError) as error:
        check_resume(run.config, TinyArgs())
    assert str(error.value) == (
        f"{tmp_path}/a/checkpoint/step-2 holds only the model, so this run cannot branch from it. "
        "Take another checkpoint, or set checkpoint.initial_load_model_only = true to start at "
        "step 0 with its weights"
    )
    run.config.checkpoint.initial_load_model_only = True
    check_resume(run.config, TinyArgs())


def test_a_branch_is_of_the_same_model(tmp_path: Path, parent: Path) -> None:
    config = branch(tmp_path / "b", parent).config
    message = r"step-2 is of another model.*\n  dim = 4 \(now 8\)\n.*, or set .*model_only = true"
    with pytest.raises(CheckpointError, match=message):
        check_resume(config, TinyArgs(dim=8))


def test_a_branch_is_of_a_checkpoint_that_is_whole(tmp_path: Path, parent: Path) -> None:
    config = branch(tmp_path / "b", parent.parent).config
    with pytest.raises(CheckpointError, match=r"is the folder of a run\. Give one of.*step-2"):
        check_resume(config, TinyArgs())
    config.checkpoint.initial_load_path = str(parent)
    os.truncate(parent / "__0_0.distcp", 10)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is damaged"):
        check_resume(config, TinyArgs())


def test_a_branch_has_steps_left(tmp_path: Path, parent: Path) -> None:
    config = branch(tmp_path / "b", parent, steps=2).config
    with pytest.raises(ConfigError) as error:
        check_resume(config, TinyArgs())
    assert str(error.value) == (
        "training.steps = 2: no step is left to train, since this run goes on from step 2: "
        f"{parent}"
    )
    config.checkpoint.exclude_from_loading = ["train_state"]
    check_resume(config, TinyArgs())


def test_a_run_that_counts_its_steps_anew_exports_at_its_own_last_step(
    tmp_path: Path, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"exclude_from_loading": ["train_state"], "last_save_in_hf": True}
    run, exported = branch(tmp_path / "b", parent, steps=1, **options), []
    monkeypatch.setattr(run.manager._final_export, "save", exported.append)
    assert run.manager.load() == 2 and run.state.step == 0
    assert exported == []
    run.train(1, last=True)
    assert exported == [1]
