from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn

from torchtitan.components import rounded_adam
from torchtitan.components.rounded_adam import RoundedAdam, RoundedAdamW
from torchtitan.planning.memory import PeakMemory
from torchtitan.preflight.validate import _MOST_DECAY

SHAPES = [(37, 16), (5, 8, 8), (64,), (), (0, 4)]
"""With rows of whole vectors: a CPU rounds differently what is left over."""
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
KERNELS: dict[str, dict[str, Any]] = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "for-loop": {"foreach": False},
}
MOMENTS = ("exp_avg", "exp_avg_sq")
EXACT = {RoundedAdam: torch.optim.Adam, RoundedAdamW: torch.optim.AdamW}


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    """To most, so that the parameters do not stay at the same number of steps."""
    torch.manual_seed(step)
    for number, param in enumerate(params):
        param.grad = torch.randn_like(param) if (step + number) % 4 else None


@pytest.mark.parametrize("cls", EXACT)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("most", [2**25, 64])
def test_a_step_is_pytorchs_and_then_moments_are_rounded(
    cls: type[RoundedAdam], kernel: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the parameters are taken a few rows at a time."""
    monkeypatch.setattr(rounded_adam, "_MOST_ELEMENTS", most)
    params, expected = parameters(), parameters()
    rounded = cls(params, **OPTIONS, **KERNELS[kernel])
    exact = EXACT[cls](expected, **OPTIONS, **KERNELS[kernel])
    for step in range(8):
        give_gradients(params, step)
        give_gradients(expected, step)
        rounded.step()
        exact.step()
        for param, like in zip(params, expected, strict=True):
            assert torch.equal(param, like)
            state, of_exact = rounded.state[param], exact.state[like]
            assert state.keys() == of_exact.keys()
            for name in of_exact.keys() & MOMENTS:
                of_exact[name].copy_(of_exact[name].bfloat16())
                assert state[name].dtype == torch.bfloat16
            assert all(torch.equal(state[name].float(), of_exact[name]) for name in of_exact)


def test_exact_moments_are_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounded_adam, "_MOST_ELEMENTS", 1000)
    params = [nn.Parameter(torch.randn(shape)) for shape in [(100, 64), *[(20, 30)] * 8, (900,)]]
    optimizer = RoundedAdamW(params, fused=True)
    for param in params:
        param.grad = torch.randn_like(param)
    with PeakMemory() as memory:
        memory.add(*params, *(param.grad for param in params))
        held = memory.current
        optimizer.step()
        numbers = sum(param.numel() for param in params)
        assert memory.current - held == pytest.approx(4 * numbers, rel=0.01)
        held = memory.current
        memory.reset_peak()
        optimizer.step()
    assert 0.9 * 8000 < memory.peak - held < 1.1 * 8000


def second_moment(beta: float) -> float:
    """The mean after gradients whose variance fell from 1 to 0.01, for 900 steps."""
    torch.manual_seed(0)
    param = nn.Parameter(torch.zeros(500))
    optimizer = RoundedAdam([param], betas=(0.9, beta), fused=True)
    for step in range(1100):
        param.grad = torch.randn(500) * (1.0 if step < 200 else 0.1)
        optimizer.step()
    return optimizer.state[param]["exp_avg_sq"].float().mean().item()


def test_bfloat16_follows_gradients_up_to_the_largest_beta_that_is_allowed() -> None:
    """With a larger one, changes in a step are rounded to nothing, and it does not fall."""
    assert second_moment(_MOST_DECAY) == pytest.approx(0.01, rel=0.05)
    in_float32 = 0.01 + (1 - 0.998**200) * 0.998**900
    assert second_moment(0.998) > 4 * in_float32
