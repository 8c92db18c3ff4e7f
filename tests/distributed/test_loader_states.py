"""States of loaders that a checkpoint cannot join are refused on all ranks, in the first step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks

from torchtitan.components.batch_agreement import BatchAgreement
from torchtitan.config import JobConfig
from torchtitan.errors import ConfigError
from torchtitan.runtime.process_group import init_distributed


def first_step(shapes: list[list[int]], numbers: list[int], shared: bool, saves: bool) -> str:
    """The message to a rank; "": none."""
    init_distributed(timeout_seconds=10)
    rank, config = dist.get_rank(), JobConfig()
    config.model.name, config.checkpoint.enable = "mine", saves
    loader: Any = SimpleNamespace(
        state_dict=lambda: {"rows": torch.full(shapes[rank], numbers[rank])}
    )
    sharing = 1 + shared
    dims: Any = SimpleNamespace(
        world_size=2, dp=2 // sharing, cp=1, tp=sharing, non_data_parallel_size=sharing
    )
    dp_rank = 0 if shared else rank
    try:
        agreement = BatchAgreement(dims, dp_rank, config)
        agreement.check_first_step([{"tokens": torch.tensor([dp_rank])}], loader)
    except ConfigError as error:
        return str(error)
    finally:
        dist.destroy_process_group()
    return ""


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("shapes", "numbers", "found"),
    [
        ([[4, 1], [4, 1]], [0, 0], ""),
        ([[4, 1], [3, 1]], [0, 0], "has rows of other sizes on other ranks; on this rank, [4, 1]"),
        ([[4, 1], [4, 2]], [0, 0], "has rows of other sizes on other ranks; on this rank, [4, 1]"),
        ([[4, 1], [4, 1]], [0, 1], "has different rows on ranks of one data rank"),
    ],
)
def test_states_that_do_not_go_together(
    shared: bool, shapes: list[list[int]], numbers: list[int], found: str
) -> None:
    first, second = run_ranks(first_step, 2, shapes, numbers, shared, True)
    if numbers[0] != numbers[1] and not shared:
        found = ""  # each data rank has its own
    assert bool(first) == bool(second) == bool(found) and found in first
    assert not found or first.startswith("build_dataloader_fn of mine: the loader's state_dict() ")


def test_without_checkpoints_there_is_no_state() -> None:
    assert run_ranks(first_step, 2, [[4, 1], [3, 1]], [0, 1], True, False) == ["", ""]
