"""What the numerical guard does on one process."""

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from torchtitan.components import guard as guard_module
from torchtitan.components.guard import Guard
from torchtitan.config import JobConfig
from torchtitan.distributed.parallel_dims import ParallelDims


def test_a_batch_that_cannot_be_kept_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = JobConfig()
    config.job.dump_folder = str(tmp_path)
    config.training.on_nonfinite = "skip"
    dims = SimpleNamespace(loss_copies=1, world_mesh=SimpleNamespace(mesh_dim_names=()))
    guard = Guard(config, cast(ParallelDims, dims), dp_rank=0, tokenizer="bytes")

    def fails(*args: object) -> None:
        raise ValueError("unlike\nmore lines")

    monkeypatch.setattr(guard_module, "keep_batch", fails)
    monkeypatch.setattr(guard_module.dist, "all_reduce", lambda values: None)
    monkeypatch.setattr(guard_module.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(guard_module.dist, "get_rank", lambda: 0)
    with caplog.at_level("WARNING"):
        assert not guard.allows(2, torch.tensor(float("nan")), torch.tensor(1.0), [{}])
    assert guard.counts.steps_skipped == 1
    assert "the bad batch 2 cannot be kept: ValueError: unlike\n" in caplog.text
    assert "The batch is skipped. The batch could not be kept" in caplog.text


def test_the_saved_history_has_one_length_whatever_its_numbers() -> None:
    """So that where other values of a checkpoint are does not change from save to save."""
    dims = SimpleNamespace(loss_copies=1, world_mesh=SimpleNamespace(mesh_dim_names=()))
    guard = Guard(JobConfig(), cast(ParallelDims, dims), dp_rank=0)
    lengths = set()
    for history in [(2 / 3, 1 / 3)] * 128, [(7 / 3, 1e-7 / 3)] * 128:
        guard._history.extend(history)
        state = guard.state_dict()
        lengths.add(len(state["json"]))
        guard.load_state_dict(state)
        assert list(guard._history) == history
    assert lengths == {8192}
