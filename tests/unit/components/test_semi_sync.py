"""Meetings of replica groups, with another group that is only pretended."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
import torch.nn as nn

from torchtitan.components.semi_sync import SemiSync
from torchtitan.config import JobConfig


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2)
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.register_buffer("bias", torch.zeros(2))


class Groups:
    """Two groups: the other one has trained on as many tokens, and changed nothing."""

    semi_sync = True

    def __init__(self, others_tokens: int, behind: bool = False, fails: bool = False) -> None:
        self.others_tokens, self.behind, self.fails = others_tokens, behind, fails

    def agree(self) -> bool:
        return self.behind

    def total(self, number: torch.Tensor) -> torch.Tensor:
        return number + self.others_tokens

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        if self.fails:
            for tensor in tensors:
                tensor.fill_(float("nan"))

    def agreed(self) -> bool:
        return not self.fails


def begun(method: str, groups: Groups) -> tuple[Net, SemiSync]:
    config, model = JobConfig(), Net()
    options = config.fault_tolerance
    options.enable, options.semi_sync_method, options.sync_steps = True, method, 2
    config.training.steps = 5
    semi_sync = SemiSync(config, [model], groups)
    with torch.no_grad():
        model.layer.weight.add_(1.0)  # as a checkpoint of initial weights does
    semi_sync.begin()
    return model, semi_sync


def train(model: Net, semi_sync: SemiSync, tokens: int = 100) -> None:
    with torch.no_grad():
        for param in model.layer.parameters():
            param.add_(torch.arange(param.numel()).view_as(param))
        model.bias.add_(1.0)
    semi_sync.count(torch.tensor(tokens))


def test_diloco_is_nesterov_on_the_mean_change() -> None:
    model, semi_sync = begun("diloco", Groups(300))
    reference = copy.deepcopy(model)
    outer = torch.optim.SGD(reference.layer.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    for rounds in (1, 2, 3):
        for param in reference.layer.parameters():
            # The other group has three quarters of the tokens.
            param.grad = -0.25 * torch.arange(float(param.numel())).view_as(param)
        outer.step()
        train(model, semi_sync)
        semi_sync.meet(2 * rounds)
        torch.testing.assert_close(model.layer.weight, reference.layer.weight)
        torch.testing.assert_close(model.layer.bias, reference.layer.bias)
        assert semi_sync.rounds == rounds
    assert model.frozen == 1.0


def test_local_sgd_averages_weights_and_buffers() -> None:
    model, semi_sync = begun("local_sgd", Groups(100))
    expected = model.layer.weight.detach() + 0.5 * torch.arange(6.0).view(2, 3)
    train(model, semi_sync)
    semi_sync.meet(2)
    torch.testing.assert_close(model.layer.weight.detach(), expected)
    assert model.bias.tolist() == [0.5, 0.5]


def test_a_group_that_is_behind_changes_nothing() -> None:
    model, semi_sync = begun("local_sgd", Groups(100, behind=True))
    before = model.layer.weight.detach().clone()
    train(model, semi_sync)
    semi_sync.meet(2)
    assert torch.equal(model.layer.weight, before)


def test_if_a_group_leaves_all_go_back_to_the_last_meeting(
    caplog: pytest.LogCaptureFixture,
) -> None:
    groups = Groups(100)
    model, semi_sync = begun("diloco", groups)
    train(model, semi_sync)
    semi_sync.meet(2)
    before = model.layer.weight.detach().clone()
    groups.fails = True
    train(model, semi_sync)
    semi_sync.meet(4)
    assert torch.equal(model.layer.weight, before) and semi_sync.rounds == 1
    assert "a replica group left during the meeting" in caplog.text
    groups.fails = False
    semi_sync.meet(5)  # with momentum alone, as nothing was trained on since
    assert model.layer.weight.isfinite().all() and semi_sync.rounds == 2


def test_a_round_is_resumed_where_it_was() -> None:
    model, semi_sync = begun("diloco", Groups(100))
    train(model, semi_sync)
    semi_sync.meet(2)
    train(model, semi_sync)
    saved = copy.deepcopy((model.state_dict(), semi_sync.state_dict()))
    train(model, semi_sync)
    semi_sync.meet(4)

    resumed, again = begun("diloco", Groups(100))
    resumed.load_state_dict(saved[0])
    state = again.state_dict()
    for kind in ("weights", "velocity"):
        for name, tensor in state[kind].items():
            tensor.copy_(saved[1][kind][name])
    again.load_state_dict(state | {key: saved[1][key] for key in ("rounds", "tokens")})
    again.begin()
    train(resumed, again)
    again.meet(4)
    assert torch.equal(resumed.layer.weight, model.layer.weight) and again.rounds == 2


def test_groups_meet_after_every_so_many_steps_and_the_last() -> None:
    _, semi_sync = begun("diloco", Groups(0))
    assert [step for step in range(1, 6) if semi_sync.is_due(step)] == [2, 4, 5]
