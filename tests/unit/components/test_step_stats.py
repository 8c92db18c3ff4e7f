"""What is told of several steps at once."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_run import world_of_one  # noqa: F401

from torchtitan.components.step_stats import StepStats
from torchtitan.distributed.parallel_dims import ParallelDims


def test_what_is_told_is_of_all_steps_since_the_last_logged_one() -> None:
    stats, dims = StepStats(), ParallelDims(world_size=1)
    for step, loss in enumerate([4.0, 3.0, 2.0], start=1):
        stats.add(step, torch.tensor(loss), torch.tensor(float(step)))
        if step != 2:  # as where a checkpoint is saved in between
            stats.read(dims)
    assert (stats.mean_loss, stats.max_loss, stats.grad_norm) == (3.0, 4.0, 3.0)


def test_the_loss_is_that_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four ranks, two and two have the same part of the batch."""
    monkeypatch.setattr(dist, "all_reduce", lambda losses, *_, **__: losses.mul_(4))
    dims: Any = SimpleNamespace(loss_copies=2)
    stats = StepStats()
    stats.add(3, torch.tensor(1.5), torch.tensor(5.0))
    assert stats.read(dims) == [(3, 3.0, 5.0)] and stats.read(dims) == []


def test_steps_without_labels_are_told(caplog: pytest.LogCaptureFixture) -> None:
    stats, dims = StepStats(), ParallelDims(world_size=1)
    for step in 9, 10:
        stats.add(step, torch.tensor(0.0), torch.tensor(0.0))
    stats.read(dims)
    stats.warn_of_missing_labels(10)
    assert not caplog.messages
    stats.without_labels = 1
    stats.warn_of_missing_labels(10)
    (told,) = caplog.messages
    assert told.startswith("step 10: in 1 of the last 2 steps no label counts: all are IGNORE_INDE")


def test_without_a_step_there_is_no_loss() -> None:
    """As where all steps since the last logged one were skipped."""
    assert math.isnan(StepStats().mean_loss) and math.isnan(StepStats().max_loss)
