"""What a rank is said to have worked in a step; tests/faults/test_late_ranks.py has whole runs."""

from __future__ import annotations

from itertools import count

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from checkpoint_run import world_of_one  # noqa: F401

from torchtitan.components import stragglers
from torchtitan.components.stragglers import Stragglers
from torchtitan.config import JobConfig


def test_each_measured_step_counts_its_own_waits_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = count()  # a second passes from one look to the next
    monkeypatch.setattr(stragglers, "perf_counter", lambda: float(next(clock)))
    config = JobConfig()
    config.metrics.straggler_freq = 2
    measured = Stragglers(config, [nn.Linear(1, 1)], torch.device("cpu"))
    for step in range(1, 5):
        with measured.measure(step):
            dist.all_reduce(torch.zeros(1))
        own = {"own_seconds_mean": 2.0, "own_seconds_max": 2.0, "slowest_rank": 0}
        assert measured.metrics() == (own if step % 2 == 0 else {})
