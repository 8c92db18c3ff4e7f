"""What an author's `metrics()` must not return."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from torchtitan.components import rank_metrics
from torchtitan.components.rank_metrics import loader_metrics, loss_metrics, own_number
from torchtitan.errors import ConfigError


def telling(told: dict[Any, Any]) -> Any:
    return SimpleNamespace(metrics=lambda: told)


@pytest.mark.parametrize("value", ["0.5", "much", None, torch.ones(2), [1.0], 1j])
def test_what_is_no_number_is_told_with_its_name(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^metrics\(\) of a data loader has 'ratio': .*numbers"):
        loader_metrics(telling({"ratio": value}))
    for pair in (value, 1), (1.0, value):
        with pytest.raises(ConfigError, match=r"^metrics\(\) of a loss has 'ratio': .* of one nu"):
            loss_metrics(telling({"ratio": pair}))


@pytest.mark.parametrize("pair", [1.0, (1.0,), (1.0, 2, 3), "ab", torch.ones(2)])
def test_a_term_of_the_loss_is_a_sum_and_a_count(pair: Any) -> None:
    found = r"maps 'ratio' to .*\. It must be a sum and a count, such as \(6.0, 2\)"
    with pytest.raises(ConfigError, match=found):
        loss_metrics(telling({"ratio": pair}))


def test_a_name_is_a_string() -> None:
    with pytest.raises(ConfigError, match=r"has 3: 1\.0\. Names must be strings"):
        loader_metrics(telling({3: 1.0}))


def test_numbers_may_be_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_metrics, "sum_over_ranks", lambda *_: None)
    assert loader_metrics(telling({"a": torch.tensor([0.5]), "b": 2})) == {"a": 0.5, "b": 2.0}
    assert loss_metrics(telling({"a": (torch.tensor(6.0), torch.tensor(4))})) == {"a": 1.5}
    assert own_number("a validator", "a", torch.tensor(1)) == 1.0
