"""Which gradients are told from slopes of the loss, and which losses have none."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn as nn

from torchtitan.authoring.verify import slope
from torchtitan.authoring.verify.check import CheckFailedError, NotApplicableError

Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Model(nn.Module):
    """A loss of two parameters, `a` and `b`."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a, self.b = (nn.Parameter(torch.randn(8, generator=generator)) for _ in "ab")
        self.function = function

    def forward(self) -> torch.Tensor:
        return self.function(self.a, self.b)


def compared(function: Function, precision: Any = slope._DOUBLE) -> str:
    example: Any = SimpleNamespace(run=lambda model: model(), loss=lambda out: out)
    model = Model(function)
    if precision is slope._DOUBLE:
        model.double()
    with slope._InFloat64(widens=precision is slope._DOUBLE) as mode:
        return slope._compared(slope._Loss(model, example, mode, precision))


class Wrong(torch.autograd.Function):
    """Its gradient is `factor` times the slope, plus `added`, as by a loss of a balance."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float, added: float = 0.0) -> torch.Tensor:
        ctx.factor, ctx.added = factor, added
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.factor * grad + ctx.added, None, None


def smooth(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.exp().sum() + b.pow(2).sum()


def jumps(x: torch.Tensor, size: float) -> torch.Tensor:
    """Differ between any two points, however near."""
    return size * (1e9 * x.detach()).sin().sum()


PRECISIONS = pytest.mark.parametrize(
    ("precision", "said"),
    [
        (slope._DOUBLE, "along 2 parameters' gradients, to "),
        (slope._SINGLE, "2 parameters, each within 1e-02"),
    ],
    ids=["double", "single"],
)


@PRECISIONS
def test_right_gradients_are_slopes(precision: Any, said: str) -> None:
    assert compared(smooth, precision).startswith(said)
    assert compared(lambda a, b: smooth(Wrong.apply(a, 1.0, 1.0), b), precision).startswith(said)


@pytest.mark.parametrize(("factor", "error"), [(1.05, "4.7"), (-1.0, "200.")])
@PRECISIONS
def test_a_wrong_gradient_is_named_with_its_error(
    precision: Any, said: str, factor: float, error: str
) -> None:
    with pytest.raises(CheckFailedError) as caught:
        compared(lambda a, b: smooth(Wrong.apply(a, factor), b), precision)
    assert "1 of 2 parameters" in str(caught.value)
    assert f"largest difference is {error}" in str(caught.value) and ", of a" in str(caught.value)


def test_steps_that_agree_tell_the_error() -> None:
    """The shortest is spoilt by rounding, say, and the longest by a jump."""
    start: list[torch.Tensor] = []

    def function(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        start.append(a.detach().clone())
        far = ((a.detach() - start[0])[0].abs() > 3e-4) & (a.detach() > start[0])[0]
        return smooth(Wrong.apply(a, 1.05), b) + jumps(a, 3e-8) + far.to(a.dtype)

    with pytest.raises(CheckFailedError, match=r"largest difference is 4\.7\d%, of a"):
        compared(function)


def test_a_part_that_a_gradient_lacks_is_missed_along_the_gradient_alone() -> None:
    """The other half of the parameter has no gradient, but a slope."""
    with pytest.raises(CheckFailedError, match="of b"):
        compared(lambda a, b: smooth(a, torch.cat((b[:4], b[4:].detach()))))


def test_a_parameter_of_little_influence_is_measured_beside_one_of_much() -> None:
    with pytest.raises(CheckFailedError, match=r"difference is 0\.50%, of b"):
        compared(lambda a, b: smooth(a, Wrong.apply(b, 1.005) / 30))


def test_grouped_products_are_there_in_float64() -> None:
    a, b, ends = torch.randn(6, 3), torch.randn(2, 3, 4), torch.tensor([2, 6], dtype=torch.int32)
    with slope._InFloat64():
        rows = torch._grouped_mm(a.double(), b.double(), offs=ends)
        weights = torch._grouped_mm(a.double().t(), rows, offs=ends)
    expected = torch.cat((a[:2] @ b[0], a[2:] @ b[1]))
    assert torch.allclose(rows.float(), expected, atol=1e-6)
    expected = torch.stack((a[:2].t() @ expected[:2], a[2:].t() @ expected[2:]))
    assert torch.allclose(weights.float(), expected, atol=1e-5)


def test_a_loss_that_jumps_has_no_slope_there_but_elsewhere() -> None:
    said = compared(lambda a, b: smooth(a, b) + jumps(a, 1e-3))
    assert said == "1 parameters, each within 1e-04, 1 others could not be measured"
    with pytest.raises(CheckFailedError, match=r"1 of 2 .* of b"):
        compared(lambda a, b: smooth(a, Wrong.apply(b, 1.05)) + jumps(a, 1e-3))


def test_small_influences_drown_in_float32() -> None:
    said = compared(lambda a, b: 1000 + 1e-3 * a.sum() + b.pow(2).sum(), slope._SINGLE)
    assert said == "1 parameters, each within 1e-02, 1 others could not be measured"


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda a, b: smooth(a, b) + (100 * a).detach().round().sum(), "rounds what depends"),
        (lambda a, b: smooth(a, b) + (100 * a).detach().round_().sum(), "rounds what depends"),
        (lambda a, b: smooth(a, b) * torch.rand(()), None),
    ],
    ids=["rounding", "rounding_in_place", "dropout"],
)
def test_what_has_no_slope(function: Function, reason: str | None) -> None:
    """Random numbers are the same each time."""
    if reason is None:
        assert compared(function).startswith("along 2")
        return
    with pytest.raises(NotApplicableError, match=reason):
        compared(function)


def test_a_loss_that_counts_its_calls_is_not_compared() -> None:
    calls: list[int] = []

    def function(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return smooth(a, b) * len(calls)

    with pytest.raises(NotApplicableError, match="another loss the second time"):
        compared(function)
