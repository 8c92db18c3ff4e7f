"""Batches of ranks that do not go together are refused on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from torchtitan.components import batch_agreement
from torchtitan.components.batch_agreement import (
    BatchAgreement,
    digest_of_contents,
    digest_of_names,
)
from torchtitan.config import JobConfig
from torchtitan.errors import ConfigError

TOKENS = torch.zeros(2, 4, dtype=torch.int64)
Batches = list[dict[str, torch.Tensor]]


Agreement = Callable[..., BatchAgreement]


@pytest.fixture
def agreement(monkeypatch: pytest.MonkeyPatch) -> Agreement:
    """Makes that of one of four ranks; the first two and the last two share their batches."""

    def make(ranks: list[Batches], rank: int = 0, dp: int = 2, pp: int = 1) -> BatchAgreement:
        sharing = 4 // dp
        dims: Any = SimpleNamespace(
            world_size=4, dp=dp, pp=pp, cp=1, tp=sharing // pp, non_data_parallel_size=sharing
        )

        def sum_over_ranks(own: torch.Tensor) -> None:
            if len(own) == 2:  # a number and its square
                numbers = [
                    digest_of_contents(of, rank // sharing) & 0xFFFFFF
                    for rank, of in enumerate(ranks)
                ]
                own.copy_(torch.tensor([[n, n**2] for n in numbers]).sum(0))
            else:
                given = [make(ranks, n, dp, pp).weighted_digest(of) for n, of in enumerate(ranks)]
                own.fill_(sum(given))
            monkeypatch.setattr(batch_agreement, "get_rank", lambda: rank)

        monkeypatch.setattr(batch_agreement, "sum_over_ranks", sum_over_ranks)
        monkeypatch.setattr(batch_agreement, "get_rank", lambda: rank)
        config = JobConfig()
        config.model.name = "mine"
        dp_rank = rank % dp if pp > 1 else rank // sharing
        return BatchAgreement(dims, dp_rank, config)

    return make


@pytest.mark.parametrize("different", [False, True])
def test_batches_of_different_names_are_refused_in_the_same_step(
    different: bool, agreement: Agreement
) -> None:
    text = {"tokens": TOKENS, "labels": TOKENS}
    image = text | {"pixel_values": TOKENS.float()}
    ranks = [[image, text]] * 3 + [[image, image] if different else [image, text]]
    sums = torch.tensor([digest_of_names(batches) for batches in ranks]).sum(0).tolist()
    if different:
        with pytest.raises(ConfigError, match="this rank have 'tokens', 'labels', 'pixel_values';"):
            agreement(ranks).refuse_other_names(sums, ranks[0])
    else:
        agreement(ranks).refuse_other_names(sums, ranks[0])


@pytest.mark.parametrize("pp", [1, 2])
def test_ranks_that_share_a_batch_are_given_the_same_in_each_step(
    pp: int, agreement: Agreement
) -> None:
    """Or else a pipeline would compare outputs for one batch with the labels of another."""

    def weighted_sum(*numbers: float) -> int:
        ranks = [[{"tokens": TOKENS, "labels": torch.full((2, 4), n)}] for n in numbers]
        return sum(agreement(ranks, n, pp=pp).weighted_digest(ranks[n]) for n in range(4))

    # Stages are the outermost dimension: the first and the third rank share, second and fourth.
    shared, mixed = [0.1, 0.1, 0.2, 0.2], [0.1, 0.2, 0.1, 0.2]
    if pp == 2:
        shared, mixed = mixed, shared
    agreed = agreement([])
    agreed.refuse_different(weighted_sum(*shared), 5)
    agreed.refuse_different(weighted_sum(0.1, 0.1, 0.1, 0.1), 5)
    for different in (mixed, [*shared[:3], 0.3], [0.3, *shared[1:]]):
        with pytest.raises(ConfigError, match="step 5: build_dataloader_fn of mine: ranks of one"):
            agreed.refuse_different(weighted_sum(*different), 5)


def test_ranks_that_share_nothing_read_no_contents(agreement: Agreement) -> None:
    assert agreement([], dp=4).weighted_digest([{"tokens": TOKENS}]) == 0


def test_first_batches_of_validations_and_of_data_ranks(
    agreement: Agreement, caplog: pytest.LogCaptureFixture
) -> None:
    def ranks(*numbers: float) -> list[Batches]:
        return [[{"tokens": TOKENS, "labels": torch.tensor(n).expand(2, 4, 1)}] for n in numbers]

    def train_and_validate(given: list[Batches]) -> None:
        agreement(given).check_first_step(given[0], None)
        agreement(given).check_first_validation(given[0][0])

    train_and_validate(ranks(0.1, 0.1, 0.2, 0.2))
    assert not caplog.records
    different = ranks(0.1, 0.1, 0.2, 0.3)
    with pytest.raises(ConfigError, match="build_validator_fn of mine: ranks of one data rank"):
        agreement(different).check_first_validation(different[0][0])
    train_and_validate(ranks(0.1, 0.1, 0.1, 0.1))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "build_dataloader_fn of mine: all data ranks were given the same" in caplog.text


def test_one_data_rank_has_nobody_to_differ_from(
    agreement: Agreement, caplog: pytest.LogCaptureFixture
) -> None:
    alike: list[Batches] = [[{"tokens": TOKENS}]] * 4
    agreement(alike, dp=1).check_first_step(alike[0], None)
    assert not caplog.records


def test_the_order_of_the_names_does_not_matter() -> None:
    batch = {"tokens": TOKENS, "labels": TOKENS + 1}
    turned = dict(reversed(batch.items()))
    assert digest_of_names([batch]) == digest_of_names([turned])
    assert digest_of_contents([batch], 0) == digest_of_contents([turned], 0)


def test_batches_on_a_device_are_told_apart_by_their_data_rank() -> None:
    """Without looking into them, which would make the host wait."""
    batch = {"tokens": TOKENS.to("meta")}
    first, second = (digest_of_contents([batch], rank) for rank in range(2))
    assert first == digest_of_contents([batch], 0)
    assert first != second
