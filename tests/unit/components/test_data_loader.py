"""What a data loader lacks is said at once, in one message."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from torchtitan.components.data_loader import check_dataloader, checked
from torchtitan.config import JobConfig
from torchtitan.errors import ConfigError

TOKENS = torch.zeros(2, 4, dtype=torch.int64)


@pytest.fixture
def config() -> JobConfig:
    config = JobConfig()
    config.model.name = "mine"
    config.checkpoint.enable = True
    return config


class Loader:
    def __init__(self, state: Any = None) -> None:
        self.state = {"rows": torch.tensor([[0]])} if state is None else state

    def __next__(self) -> dict[str, torch.Tensor]:
        return {"tokens": TOKENS, "labels": TOKENS}

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


def test_a_loader_with_everything_is_accepted(config):
    check_dataloader(Loader(), config)
    assert checked(next(Loader()), config)["tokens"] is TOKENS


def test_what_is_missing_is_named_at_once(config):
    loader = torch.utils.data.DataLoader([1, 2])
    with pytest.raises(ConfigError, match=r"build_dataloader_fn of mine returns DataLoader, "):
        check_dataloader(loader, config)
    with pytest.raises(ConfigError, match="has no __next__, close, state_dict, load_state_dict"):
        check_dataloader(loader, config)


def test_a_state_is_asked_for_where_there_are_checkpoints(config):
    bare = type("Bare", (), {"__next__": lambda self: {}, "close": lambda self: None})()
    with pytest.raises(ConfigError, match="Bare, which has no state_dict, load_state_dict"):
        check_dataloader(bare, config)
    config.checkpoint.enable = False
    check_dataloader(bare, config)
    with pytest.raises(ConfigError, match="SimpleNamespace, which has no __next__"):
        check_dataloader(SimpleNamespace(close=lambda: None), config)


@pytest.mark.parametrize(
    ("state", "found"),
    [
        ({"step": 3}, "has 'step'"),
        ({"rows": 3}, "has 'rows'"),
        ({"rows": torch.zeros(3, dtype=torch.int64)}, r"rows of torch.int64 \[3\]"),
        ({"rows": torch.zeros(3, 1)}, r"rows of torch.float32 \[3, 1\]"),
    ],
)
def test_a_state_is_rows(config, state, found):
    with pytest.raises(ConfigError, match=f"{found}.*must be .*int64 tensor"):
        check_dataloader(Loader(state), config)


def test_a_batch_has_tokens_and_labels_and_nothing_that_nobody_reads(config):
    with pytest.raises(ConfigError, match="a batch of the loader has 'input' but no 'tokens', 'la"):
        checked({"input": TOKENS}, config)
    with pytest.raises(ConfigError, match="of mine: a batch of the loader has 'noise'"):
        checked({"tokens": TOKENS, "labels": TOKENS, "noise": TOKENS}, config)
    with pytest.raises(ConfigError, match="gives tuple, not a dict"):
        checked((TOKENS, TOKENS), config)
