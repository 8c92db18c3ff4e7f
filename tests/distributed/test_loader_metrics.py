"""What loaders and losses tell, if each rank tells something else."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch.distributed as dist
from harness import run_ranks

from torchtitan.components import rank_metrics
from torchtitan.components.rank_metrics import highest_of_ranks, loader_metrics, loss_metrics
from torchtitan.runtime.host_sum import sum_over_ranks
from torchtitan.runtime.process_group import init_distributed


def logged(told: list[dict[str, float]]) -> tuple[dict[str, float], int]:
    """What is logged, and with how many sums."""
    init_distributed(timeout_seconds=10)
    loader = SimpleNamespace(metrics=lambda: told[dist.get_rank()])
    sums: list[None] = []
    with patch.object(
        rank_metrics, "sum_over_ranks", lambda *given: sums.append(sum_over_ranks(*given))
    ):
        found = loader_metrics(loader)
    dist.destroy_process_group()
    return found, len(sums)


@pytest.mark.parametrize(
    ("told", "means"),
    [
        ([{}, {}, {}], {}),
        ([{"a": 1.0, "b": 2.0}, {"a": 2.0, "b": 3.0}, {"a": 6.0, "b": 4.0}], {"a": 3.0, "b": 3.0}),
        ([{"a": 1.0, "b": 2.0}, {"b": 3.0, "a": 2.0}, {"a": 6.0, "b": 4.0}], {"a": 3.0, "b": 3.0}),
        ([{"skipped": 4.0}, {}, {}], {"skipped": 4.0}),
        ([{"a": 1.0, "b": 20.0}, {"b": 40.0, "a": 3.0}, {"a": 5.0}], {"a": 3.0, "b": 30.0}),
    ],
)
def test_the_mean_is_that_of_the_ranks_that_tell(
    told: list[dict[str, float]], means: dict[str, float]
) -> None:
    alike = bool(means) and all(list(names) == list(told[0]) for names in told)
    assert run_ranks(logged, 3, told) == [(means, 1 + alike)] * 3


def test_many_numbers_are_one_sum() -> None:
    told = [{f"a{number}": float(number + rank) for number in range(70)} for rank in range(2)]
    means = {f"a{number}": number + 0.5 for number in range(70)}
    assert run_ranks(logged, 2, told) == [(means, 2)] * 2


def logged_of_a_loss(told: list[dict[str, tuple[float, float]]]) -> dict[str, float]:
    init_distributed(timeout_seconds=10)
    loss = SimpleNamespace(metrics=lambda: told[dist.get_rank()])
    found = loss_metrics(loss) | loss_metrics(len)
    dist.destroy_process_group()
    return found


@pytest.mark.parametrize(
    ("told", "quotients"),
    [
        ([{"a": (6.0, 2), "b": (0.0, 0)}, {"a": (3.0, 4), "b": (0.0, 0)}], {"a": 1.5}),
        ([{"a": (6.0, 2)}, {}], {"a": 3.0}),
        ([{}, {}], {}),
    ],
)
def test_a_term_of_the_loss_is_the_sum_over_the_count_of_all_ranks(
    told: list[dict[str, tuple[float, float]]], quotients: dict[str, float]
) -> None:
    assert run_ranks(logged_of_a_loss, 2, told) == [quotients] * 2


def highest() -> float:
    init_distributed(timeout_seconds=10)
    found = highest_of_ranks(2.0 - dist.get_rank())
    dist.destroy_process_group()
    return found


def test_the_highest_value_is_that_of_any_rank() -> None:
    assert run_ranks(highest, 2) == [2.0, 2.0]
