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

    def make(ranks: list[Batches], dp: int = 2) -> BatchAgreement:
        sharing = 4 // dp
        dims: Any = SimpleNamespace(world_size=4, dp=dp, non_data_parallel_size=sharing)

        def sum_over_ranks(own: torch.Tensor) -> None:
            given = [digest_of_contents(of, rank // sharing, dp) for rank, of in enumerate(ranks)]
            own.copy_(torch.stack(given).sum(0))

        monkeypatch.setattr(batch_agreement, "sum_over_ranks", sum_over_ranks)
        config = JobConfig()
        config.model.name = "mine"
        return BatchAgreement(dims, 0, config)

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


def test_ranks_that_share_a_batch_are_given_the_same(
    agreement: Agreement, caplog: pytest.LogCaptureFixture
) -> None:
    """Or else a pipeline would compare outputs for one batch with the labels of another."""

    def ranks(*numbers: float) -> list[Batches]:
        return [[{"tokens": TOKENS, "labels": torch.tensor(n).expand(2, 4, 1)}] for n in numbers]

    def train_and_validate(given: list[Batches]) -> None:
        agreement(given).check_first_step(given[0], None)
        agreement(given).check_first_validation(given[0][0])

    train_and_validate(ranks(0.1, 0.1, 0.2, 0.2))
    assert not caplog.records
    different = ranks(0.1, 0.1, 0.2, 0.3)
    with pytest.raises(ConfigError, match="build_dataloader_fn of mine: ranks of one data rank"):
        agreement(different).check_first_step(different[0], None)
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
    assert torch.equal(digest_of_contents([batch], 0, 1), digest_of_contents([turned], 0, 1))


def test_batches_on_a_device_are_told_apart_by_their_data_rank() -> None:
    """Without looking into them, which would make the host wait."""
    batch = {"tokens": TOKENS.to("meta")}
    first, second = (digest_of_contents([batch], rank, 2) for rank in range(2))
    assert torch.equal(first, digest_of_contents([batch], 0, 2))
    assert first[0, 0] != second[1, 0]


def test_later_batches_are_not_compared(agreement: Agreement) -> None:
    several: list[Batches] = [[{"tokens": TOKENS + rank // 2}] for rank in range(4)]
    agreed = agreement(several)
    agreed.check_first_step(several[0], None)
    several[1] = several[3]
    agreed.check_first_step(several[0], None)
