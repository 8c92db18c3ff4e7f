from __future__ import annotations

import pytest
import torch

from torchtitan.components.lr_scheduler import (
    LRSchedulersContainer,
    build_lr_scheduler,
    lr_schedulers_of,
    schedule_of,
)
from torchtitan.config import JobConfig, load_config
from torchtitan.config.lr_scheduler import LRScheduler
from torchtitan.errors import ConfigError


def lr_factor(step: int, *, steps: int, warmup_steps: int = 0, **shape) -> float:
    return schedule_of(LRScheduler(warmup_steps, **shape), steps)(step)


def test_warm_up_stable_and_decay_meet_at_their_boundaries() -> None:
    shape = dict(steps=100, warmup_steps=10, decay_ratio=0.2, min_lr_factor=0.1)
    assert lr_factor(0, **shape) == pytest.approx(0.1)
    assert lr_factor(9, **shape) == 1
    assert [lr_factor(s, **shape) for s in (10, 50, 80)] == [1, 1, 1]
    assert lr_factor(90, **shape) == pytest.approx(0.55)
    assert lr_factor(100, **shape) == pytest.approx(0.1)
    assert lr_factor(72, steps=100, decay_ratio=0.29) < 1  # though 0.29 * 100 is below 29


@pytest.mark.parametrize(
    ("decay_type", "half"), [("linear", 0.5), ("cosine", 0.5), ("sqrt", 0.293)]
)
def test_decay_types_half_way(decay_type: str, half: float) -> None:
    factor = lr_factor(60, steps=100, warmup_steps=20, decay_type=decay_type)
    assert factor == pytest.approx(half, abs=1e-3)


def test_a_run_shorter_than_its_warm_up_follows_the_warm_up() -> None:
    assert lr_factor(9, steps=10, warmup_steps=200) == pytest.approx(0.05)
    assert lr_factor(200, steps=10, warmup_steps=200) == lr_factor(201, steps=10, warmup_steps=200)


def test_a_decay_longer_than_what_the_warm_up_leaves_begins_after_the_warm_up() -> None:
    for step in (59, 60, 61, 99):
        whole = lr_factor(step, steps=100, warmup_steps=60)
        assert lr_factor(step, steps=100, warmup_steps=60, decay_ratio=0.9) == whole


def test_after_the_last_step_of_the_schedule_the_learning_rate_stays() -> None:
    """As with `total_steps` below `training.steps`: it must not become negative."""
    assert lr_factor(150, steps=100, min_lr_factor=0.1) == pytest.approx(0.1)
    assert lr_factor(150, steps=100, decay_ratio=0.0) == 1


def test_groups_keep_their_ratio_and_a_resumed_schedule_goes_on() -> None:
    def build() -> tuple[torch.optim.Optimizer, LRSchedulersContainer]:
        weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
        groups = [{"params": [weights[0]], "lr": 1.0}, {"params": [weights[1]], "lr": 0.5}]
        optimizer = torch.optim.SGD(groups, lr=1.0)
        schedule = LRSchedulersContainer(
            [optimizer], lambda step: lr_factor(step, steps=10, warmup_steps=4)
        )
        return optimizer, schedule

    optimizer, schedule = build()
    for _ in range(6):
        schedule.step()
    resumed_optimizer, resumed = build()
    resumed.load_state_dict(schedule.state_dict())
    for one in (optimizer, resumed_optimizer):
        first, second = (group["lr"] for group in one.param_groups)
        assert first == pytest.approx(2 / 3)
        assert second == pytest.approx(first / 2)
    assert resumed.last_lr == schedule.last_lr == pytest.approx(2 / 3)  # the highest


def test_a_trial_run_has_the_learning_rates_of_the_whole_one() -> None:
    def rates(*options: str) -> list[float]:
        config = load_config(["--lr_scheduler.warmup_steps=2", *options])
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = build_lr_scheduler([optimizer], config)
        found = []
        for _ in range(5):
            found.append(schedule.last_lr)
            schedule.step()
        return found

    others = ("decay_type=sqrt", "decay_ratio=0.4", "min_lr_factor=0.1")
    found = rates("--training.steps=5", *(f"--lr_scheduler.{option}" for option in others))
    assert found == pytest.approx([0.5, 1, 1, 1, 0.1 + 0.9 * (1 - 0.5**0.5)])
    whole = rates("--training.steps=100")
    assert rates("--training.steps=5", "--lr_scheduler.total_steps=100") == whole
    assert rates("--training.steps=5") != whole


def test_a_schedule_of_pytorch_is_refused_with_what_to_return() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    message = r"^build_lr_scheduler_fn of llama3 returns LambdaLR, which has no last_lr. Return .*L"
    with pytest.raises(ConfigError, match=message):
        lr_schedulers_of(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1.0), JobConfig())
    ours = LRSchedulersContainer([optimizer], lambda s: 1.0)
    assert lr_schedulers_of(ours, JobConfig()) is ours
