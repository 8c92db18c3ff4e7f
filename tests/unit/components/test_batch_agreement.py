"""Batches of ranks that do not go together are refused on all ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from torchtitan.components.batch_agreement import (
    BatchAgreement,
    digest_of_contents,
    digest_of_names,
)
from torchtitan.config import JobConfig
from torchtitan.errors import ConfigError

TOKENS = torch.zeros(2, 4, dtype=torch.int64)
Batches = list[dict[str, torch.Tensor]]


def agreement(ranks: list[Batches]) -> BatchAgreement:
    """That of one of four ranks; the first two and the last two share their batches."""
    dims: Any = SimpleNamespace(world_size=4, dp=2, non_data_parallel_size=2)

    def sum_over_ranks(own: torch.Tensor) -> None:
        rows = [digest_of_contents(given, rank // 2, 2) for rank, given in enumerate(ranks)]
        own.copy_(torch.stack(rows).sum(0))

    config, host_sum = JobConfig(), cast(Any, sum_over_ranks)
    config.model.name = "mine"
    return BatchAgreement(host_sum, dims, 0, config)


@pytest.mark.parametrize("different", [False, True])
def test_batches_of_different_names_are_refused_in_the_same_step(different: bool) -> None:
    text = {"tokens": TOKENS, "labels": TOKENS}
    image = text | {"pixel_values": TOKENS.float()}
    ranks = [[image, text]] * 3 + [[image, image] if different else [image, text]]
    sums = torch.tensor([digest_of_names(batches) for batches in ranks]).sum(0).tolist()
    if different:
        with pytest.raises(ConfigError, match="this rank have 'tokens', 'labels', 'pixel_values';"):
            agreement(ranks).refuse_other_names(sums, ranks[0])
    else:
        agreement(ranks).refuse_other_names(sums, ranks[0])


def test_ranks_that_share_a_batch_are_given_the_same(caplog: pytest.LogCaptureFixture) -> None:
    """Or else a pipeline would compare outputs for one batch with the labels of another."""

    def ranks(*numbers: float) -> list[Batches]:
        return [[{"tokens": TOKENS, "labels": torch.full((2, 4, 1), n)}] for n in numbers]

    def train_and_validate(given: list[Batches]) -> None:
        agreement(given).check_first_step(given[0])
        agreement(given).check_first_validation(given[0][0])

    train_and_validate(ranks(0.1, 0.1, 0.2, 0.2))
    assert not caplog.records
    different = ranks(0.1, 0.1, 0.2, 0.3)
    with pytest.raises(ConfigError, match="build_dataloader_fn of mine: ranks of one data rank"):
        agreement(different).check_first_step(different[0])
    with pytest.raises(ConfigError, match="build_validator_fn of mine: ranks of one data rank"):
        agreement(different).check_first_validation(different[0][0])
    train_and_validate(ranks(0.1, 0.1, 0.1, 0.1))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "build_dataloader_fn of mine: all data ranks were given the same" in caplog.text


def test_later_batches_are_not_compared() -> None:
    several: list[Batches] = [[{"tokens": TOKENS + rank // 2}] for rank in range(4)]
    agreed = agreement(several)
    agreed.check_first_step(several[0])
    several[1] = several[3]
    agreed.check_first_step(several[0])
