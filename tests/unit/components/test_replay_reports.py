"""Whom a replayed step blames, by the checksums of all ranks."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn

from torchtitan.components import replay
from torchtitan.components.replay import Replay, checksum
from torchtitan.config import JobConfig
from torchtitan.errors import TrainingError

INPUTS = ["its input to send", "its input to recv"]
NAMES = [*INPUTS, "its loss", "its gradient of a", "its gradient of b"]


class Rank(NamedTuple):
    different: tuple[int, ...] = ()
    """Numbers of the checksums that differ the second time."""
    stage: int = 0
    count: int = len(NAMES)
    """Number of checksums the second time."""


def report(ranks: list[Rank], monkeypatch: pytest.MonkeyPatch) -> str:
    """What each rank says in the end."""
    facts: list[Any] = []
    monkeypatch.setattr(replay, "sum_over_ranks", lambda found: found.fill_(1))
    monkeypatch.setattr(dist, "get_world_size", lambda: len(ranks))

    def compare(number: int, gather: Callable[[list[Any], Any], object]) -> str:
        stage: Any = SimpleNamespace(pp_rank=ranks[number].stage, pp_enabled=False)
        monkeypatch.setattr(dist, "get_rank", lambda: number)
        monkeypatch.setattr(dist, "all_gather_object", gather)
        second = [int(at in ranks[number].different) for at in range(ranks[number].count)]
        names = [*NAMES, *INPUTS][: len(second)]
        with pytest.raises(TrainingError, match="step 7") as error:
            Replay(JobConfig(), [nn.Linear(1, 1)], stage)._compare(
                7, [0] * len(NAMES), second, names
            )
        return str(error.value)

    for number in range(len(ranks)):
        compare(number, lambda _, own: facts.append(own))

    def gather(of_ranks: list[Any], own: Any) -> None:
        of_ranks[:] = facts

    return compare(0, gather)


@pytest.mark.parametrize(
    ("ranks", "blamed"),
    [
        ([Rank(), Rank((1, 2, 3)), Rank((0, 2, 3))], {2: "its input to send"}),
        ([Rank((3,)), Rank((2, 3))], {1: "its loss"}),
        ([Rank((4,)), Rank((3, 4))], {0: "its gradient of b", 1: "its gradient of a"}),
        ([Rank((1,)), Rank((3,), stage=1)], {0: "its input to recv", 1: "its gradient of a"}),
        ([Rank(), Rank(count=3)], {1: "its loss"}),
        ([Rank(), Rank(count=7)], {1: "its gradient of b"}),
    ],
    ids=["first", "loss", "gradients", "stages", "fewer", "more"],
)
def test_the_ranks_that_differed_first_are_blamed(
    ranks: list[Rank], blamed: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients are not exchanged, so they all count as the same time; as do those of stages."""
    told = report(ranks, monkeypatch)
    named = re.findall(r"rank (\d) \([^)]*\), in (.*?)(?= or |\. The hardware)", told)
    assert {int(rank): what for rank, what in named} == blamed


def test_of_many_ranks_some_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    told = report([Rank((0,))] * 10, monkeypatch)
    assert told.count("its input to send") == 8 and " or 2 more. The hardware" in told
    assert "10 of 10 ranks differ" in told


def test_the_checksum_of_complex_numbers_is_that_of_their_parts() -> None:
    parts = torch.arange(6.0).view(3, 2)
    assert checksum(torch.view_as_complex(parts)) == checksum(parts)
