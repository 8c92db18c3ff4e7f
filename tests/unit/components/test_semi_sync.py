"""Meetings of replica groups, with another group that is only pretended."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from checkpoint_run import world_of_one  # noqa: F401

from torchtitan.components.checkpoint import TrainState, model_tensors
from torchtitan.components.semi_sync import SemiSync
from torchtitan.config import JobConfig
from torchtitan.distributed.stage_copies import record_sharing, shared_weights
from torchtitan.errors import TrainingError
from torchtitan.train import Trainer

NO_STOP = SimpleNamespace(received=False)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2)
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.register_buffer("bias", torch.zeros(2))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(3, 2)
        self.output = nn.Linear(2, 3)
        self.output.weight = self.tok_embeddings.weight


class Groups:
    """Two groups: the other one has trained on as many tokens, and changed nothing."""

    semi_sync = True
    too_few = False

    def __init__(self, others_tokens: int, behind: bool = False, fails: bool = False) -> None:
        self.others_tokens, self.behind, self.fails = others_tokens, behind, fails
        self.progress: list[int] = []

    def agree(self, progress: int, stop: object) -> bool:
        self.progress.append(progress)
        return self.behind

    def refuse_others(self) -> None:
        pass

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
    semi_sync = SemiSync(config, [model], groups, TrainState())
    with torch.no_grad():
        model.layer.weight.add_(1.0)  # as a checkpoint of initial weights does
    semi_sync.begin()
    return model, semi_sync


def meet(semi_sync: SemiSync, step: int) -> None:
    semi_sync._train_state.step = step
    assert not semi_sync.meet(NO_STOP)


def train(model: Net, semi_sync: SemiSync, tokens: int = 100) -> None:
    with torch.no_grad():
        for param in model.layer.parameters():
            param.add_(torch.arange(param.numel()).view_as(param))
        model.bias.add_(1.0)
    for part in (tokens - 40, 40):  # as of two steps
        semi_sync.count(torch.tensor(part))


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
        meet(semi_sync, 2 * rounds)
        torch.testing.assert_close(model.layer.weight, reference.layer.weight)
        torch.testing.assert_close(model.layer.bias, reference.layer.bias)
    assert semi_sync.state_dict()["weights"].keys() == {"layer.weight", "layer.bias"}


def test_local_sgd_averages_weights_and_buffers() -> None:
    model, semi_sync = begun("local_sgd", Groups(100))
    expected = model.layer.weight.detach() + 0.5 * torch.arange(6.0).view(2, 3)
    train(model, semi_sync)
    meet(semi_sync, 2)
    torch.testing.assert_close(model.layer.weight.detach(), expected)
    assert model.bias.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("as_listed", [True, False])
def test_groups_average_buffers_in_one_order(
    as_listed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in that of a set of names, which differs between processes."""
    names = ["first", "second"] if as_listed else ["second", "first"]
    monkeypatch.setattr(model_tensors, "buffer_names", lambda parts: names)
    model = nn.Linear(1, 1)
    for value, name in enumerate(("first", "second"), start=1):
        model.register_buffer(name, torch.tensor([float(value)]))
    config, groups = JobConfig(), Groups(0)
    config.fault_tolerance.enable, config.fault_tolerance.semi_sync_method = True, "local_sgd"
    added_up: list[float] = []
    monkeypatch.setattr(groups, "add_up", lambda tensors: added_up.extend(map(float, tensors[2:])))
    semi_sync = SemiSync(config, [model], groups, TrainState())
    semi_sync.count(torch.tensor(1))
    meet(semi_sync, 2)
    assert added_up == [1.0, 2.0]


def test_a_group_that_is_behind_changes_nothing() -> None:
    model, semi_sync = begun("local_sgd", Groups(100, behind=True))
    before = model.layer.weight.detach().clone()
    train(model, semi_sync)
    meet(semi_sync, 2)
    assert torch.equal(model.layer.weight, before)


def test_if_a_group_leaves_all_go_back_to_the_last_meeting(
    caplog: pytest.LogCaptureFixture,
) -> None:
    groups = Groups(100)
    model, semi_sync = begun("diloco", groups)
    train(model, semi_sync)
    meet(semi_sync, 2)
    before = model.layer.weight.detach().clone()
    groups.fails = True
    train(model, semi_sync)
    meet(semi_sync, 4)
    assert torch.equal(model.layer.weight, before)
    assert "a replica group left during the meeting" in caplog.text
    groups.fails = False
    meet(semi_sync, 6)  # with momentum alone, as nothing was trained on since
    assert model.layer.weight.isfinite().all()


def test_after_the_last_step_the_groups_that_remain_meet_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    groups = Groups(0, fails=True)
    model, semi_sync = begun("local_sgd", groups)
    train(model, semi_sync)
    trained = model.layer.weight.detach().clone()

    def agreed() -> bool:
        groups.fails = len(groups.progress) == 1
        return len(groups.progress) == 3

    groups.agreed = agreed
    meet(semi_sync, 5)
    torch.testing.assert_close(model.layer.weight.detach(), trained)
    assert not caplog.text


def test_a_group_told_to_stop_while_it_waits_keeps_its_round() -> None:
    groups = Groups(100)
    model, semi_sync = begun("local_sgd", groups)
    train(model, semi_sync)
    before = copy.deepcopy((model.state_dict(), semi_sync.state_dict()))
    stop, stops = SimpleNamespace(received=True), []

    def agree(progress: int, stop: object) -> bool:
        stops.append(stop)
        groups.too_few = stop is not None
        return False

    groups.agree = agree
    semi_sync._train_state.step = 2
    assert semi_sync.meet(stop)
    for ours, kept in zip((model.state_dict(), semi_sync.state_dict()), before, strict=True):
        torch.testing.assert_close(ours, kept, rtol=0, atol=0)
    semi_sync._train_state.step = 5  # the last: no later meeting would make up for it
    assert not semi_sync.meet(stop)
    assert stops == [stop, None]


def test_a_round_is_resumed_where_it_was() -> None:
    model, semi_sync = begun("diloco", Groups(100))
    train(model, semi_sync)
    meet(semi_sync, 2)
    train(model, semi_sync)
    saved = copy.deepcopy((model.state_dict(), semi_sync.state_dict()))
    train(model, semi_sync)
    meet(semi_sync, 4)

    resumed, again = begun("diloco", Groups(100))
    resumed.load_state_dict(saved[0])
    state = again.state_dict()
    for kind in ("weights", "velocity"):
        for name, tensor in state[kind].items():
            tensor.copy_(saved[1][kind][name])
    again.load_state_dict(state | {key: saved[1][key] for key in ("began", "tokens")})
    again.begin()
    train(resumed, again)
    meet(again, 4)
    assert torch.equal(resumed.layer.weight, model.layer.weight)


def test_groups_meet_after_every_so_many_steps_and_the_last() -> None:
    _, semi_sync = begun("diloco", Groups(0))
    due = []
    for step in range(1, 6):
        semi_sync._train_state.step = step
        due += [step] if semi_sync.is_due() else []
    assert due == [2, 4, 5]


def test_who_met_is_ahead_of_who_did_not_and_then_who_has_more_steps() -> None:
    """Also if a meeting failed for some of the groups, or a run turns meetings on."""
    groups = Groups(100)
    _, semi_sync = begun("diloco", groups)
    meet(semi_sync, 2)
    groups.fails = True
    meet(semi_sync, 4)
    groups.fails = False
    meet(semi_sync, 6)
    meet(semi_sync, 8)
    began_and_step = [divmod(progress, 2**32) for progress in groups.progress]
    assert began_and_step == [(0, 2), (2, 4), (2, 6), (6, 8)]

    _, others = begun("diloco", groups)
    others._train_state.step = 5  # as in a checkpoint of a run without meetings
    others.begin()
    meet(others, 8)
    assert divmod(groups.progress[-1], 2**32) == (5, 8)


def test_a_group_that_takes_over_the_state_of_another_is_no_longer_behind() -> None:
    groups = Groups(100)
    _, semi_sync = begun("diloco", groups)

    def agree(progress: int, stop: object) -> bool:
        semi_sync._train_state.step = 8
        return True

    groups.agree = agree
    meet(semi_sync, 4)
    assert semi_sync.state_dict()["began"] == 8


def test_a_meeting_of_groups_that_trained_on_nothing_keeps_the_buffers() -> None:
    model, semi_sync = begun("local_sgd", Groups(0))
    before = model.layer.weight.detach().clone()
    model.bias.add_(1.0)
    meet(semi_sync, 2)
    assert model.bias.tolist() == [1.0, 1.0] and torch.equal(model.layer.weight, before)


def test_copies_of_weights_of_other_stages_are_left_to_their_owners() -> None:
    """Otherwise a checkpoint would depend on the number of stages."""
    config = JobConfig()
    config.fault_tolerance.enable, config.fault_tolerance.semi_sync_method = True, "diloco"
    whole = Tied()
    names = shared_weights(whole, [["tok_embeddings"], ["output"]])
    whole.tok_embeddings = None
    record_sharing(whole, 1, names, Tied())
    state = SemiSync(config, [whole], Groups(0), TrainState()).state_dict()
    assert state["weights"].keys() == {"output.bias"}


def test_a_meeting_has_finite_weights_that_no_save_is_copying() -> None:
    model, semi_sync = begun("diloco", Groups(100))
    with torch.no_grad():
        model.layer.weight[0, 0] = float("nan")
    progress = semi_sync._replicas.progress
    trainer = SimpleNamespace(
        watch=SimpleNamespace(enter=lambda *_: None),
        state=semi_sync._train_state,
        optimizers=SimpleNamespace(zero_grad=lambda: None),
        semi_sync=semi_sync,
        checkpointer=SimpleNamespace(wait_for_copy=lambda: progress.append(-1)),
        stage_copies=SimpleNamespace(spread_weights=lambda: None),
        _parameters=lambda: list(model.parameters()),
    )
    with pytest.raises(TrainingError, match="weights are not finite"):
        Trainer._meet_other_groups(trainer, NO_STOP)
    assert progress == []
    torch.nn.init.zeros_(model.layer.weight)
    assert not Trainer._meet_other_groups(trainer, NO_STOP)
    assert progress == [-1, 0]


def test_small_outer_updates_of_bfloat16_weights_add_up() -> None:
    config, model = JobConfig(), Net().bfloat16()
    options = config.fault_tolerance
    options.enable, options.semi_sync_method = True, "local_sgd"
    with torch.no_grad():
        model.layer.weight.fill_(1.0)
    semi_sync = SemiSync(config, [model], Groups(700), TrainState())
    semi_sync.begin()
    for _ in range(8):
        with torch.no_grad():
            model.layer.weight.add_(2**-7)  # of which an eighth is less than bfloat16 resolves
        semi_sync.count(torch.tensor(100))
        semi_sync.meet(NO_STOP)
    assert semi_sync.state_dict()["weights"]["layer.weight"][0, 0] == 1 + 2**-7
    assert model.layer.weight[0, 0] == 1 + 2**-7
