"""A rank that writes for longer than a step of training may take does not end the run."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch.distributed as dist
from harness import run_ranks
from test_checkpoint_layouts import Run

from torchtitan.components.checkpoint.writer import CheckpointWriter
from torchtitan.runtime.process_group import init_distributed


def save_slowly(folder: Path, async_mode: str) -> int | None:
    init_distributed(timeout_seconds=2)
    run = Run("fsdp2", folder, async_mode=async_mode)
    write_data = CheckpointWriter.write_data

    def write_late(self, plan, planner):
        if dist.get_rank() == 1:
            time.sleep(5)
        return write_data(self, plan, planner)

    CheckpointWriter.write_data = write_late
    run.train(2)
    run.manager.wait()
    run.manager.close()
    return run.manager.last_saved


@pytest.mark.parametrize("async_mode", [pytest.param("disabled", marks=pytest.mark.long), "async"])
def test_the_timeout_of_training_does_not_hold_for_saves(tmp_path: Path, async_mode: str) -> None:
    assert run_ranks(save_slowly, 2, tmp_path, async_mode) == [2, 2]
