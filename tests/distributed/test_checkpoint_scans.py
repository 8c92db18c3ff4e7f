"""One rank looks what checkpoints there are; the others are told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist
from harness import on_ranks
from test_checkpoint_layouts import NetArgs, Run

from torchtitan.components.checkpoint import storage
from torchtitan.components.checkpoint.manifest import Manifest
from torchtitan.components.checkpoint.resume import check_resume
from torchtitan.components.checkpoint.writer import CheckpointWriter
from torchtitan.config import JobConfig
from torchtitan.errors import CheckpointError


def forbid_scans() -> None:
    """On all ranks but 0."""

    def refuse(*args):
        raise AssertionError("this rank has looked for itself")

    if dist.get_rank() != 0:
        storage._entries = refuse
        Manifest.read = refuse


def save_fail_and_resume(folder: Path) -> None:
    forbid_scans()
    Run("fsdp2", folder).train(4)
    config = JobConfig()
    config.job.dump_folder, config.checkpoint.enable = str(folder), True
    with pytest.raises(CheckpointError, match=r"step-4 is of another model.*\n  model.flavor"):
        config.model.flavor = "other"
        check_resume(config, NetArgs(), dist.group.WORLD)
    config.model.flavor = JobConfig().model.flavor
    check_resume(config, NetArgs(), dist.group.WORLD)

    for async_mode in ("disabled", "async"):
        run = Run("fsdp2", folder, seed=1, async_mode=async_mode)
        assert run.manager.load() == 4
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CheckpointWriter, "write_data", no_space)
            run.train(6)
            run.manager.wait()
            with pytest.raises(
                CheckpointError,
                match=r"The newest checkpoint is step-4\. Free some space, then try again$",
            ):
                run.train(7, last=True)
        assert run.manager.newest() == folder / "checkpoint" / "step-4"
        assert run.manager.roll_back() == 4
        run.manager.close()

    with pytest.raises(CheckpointError, match=r"no .*step-3\. Steps to resume from: 2, 4$"):
        Run("fsdp2", folder, load_step=3).manager.load()


def no_space(self, plan, planner):
    raise OSError(28, "No space left on device")


def test_rank_0_alone_looks_at_the_folder(tmp_path: Path) -> None:
    on_ranks(2, save_fail_and_resume, tmp_path)
