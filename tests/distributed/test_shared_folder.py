"""A folder of checkpoints that hosts do not share is found before the first step."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch.distributed as dist
from harness import on_ranks
from test_checkpoint_layouts import Run

from torchtitan.components.checkpoint import owner
from torchtitan.components.checkpoint.owner import OWNER, Claim, Owner, TakenOverError
from torchtitan.errors import CheckpointError


def load_in_own_folder(folder: Path) -> None:
    """Where hosts share nothing, each has the path for itself."""
    run = Run("fsdp2", folder / f"host{dist.get_rank()}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, "SEEN_AFTER", (0.1,))
        match = rf"^{folder}/host1/checkpoint on \S+ \(rank 1\) is not .*{folder}/host0/.*share"
        with pytest.raises(CheckpointError, match=match):
            run.manager.load()


def load_where_files_are_seen_late(folder: Path) -> None:
    run = Run("fsdp2", folder)
    seen, of = [], Owner.of

    def late(path):
        seen.append(path)
        return None if len(seen) < 3 else of(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, "SEEN_AFTER", (0.1, 0.1))
        if dist.get_rank() == 1:
            patch.setattr(Owner, "of", late)
        assert run.manager.load() == 0
    assert dist.get_rank() == 0 or len(seen) == 3


def lose_the_folder_to_another_run(folder: Path) -> None:
    run = Run("fsdp2", folder)
    take = Claim.take

    def take_and_lose(claim):
        taken = take(claim)
        there = replace(taken, start="another", host="another")
        (folder / "checkpoint" / OWNER).write_text(json.dumps(asdict(there)))
        return taken

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, "SEEN_AFTER", ())
        patch.setattr(Claim, "take", take_and_lose)
        with pytest.raises(TakenOverError, match="on another, since"):
            run.manager.load()


def three_folders(folder: Path) -> None:
    load_in_own_folder(folder)
    load_where_files_are_seen_late(folder / "late")
    lose_the_folder_to_another_run(folder / "lost")


def test_a_folder_that_hosts_do_not_share_is_told_at_the_start(tmp_path: Path) -> None:
    on_ranks(2, three_folders, tmp_path)
