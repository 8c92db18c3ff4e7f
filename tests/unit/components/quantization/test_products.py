"""Quantized products against exact ones, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from torchtitan.components.quantization.products import (
    quantized_grouped_linear,
    quantized_linear,
)
from torchtitan.components.quantization.scaling import E4M3, E5M2, quantize
from torchtitan.errors import ConfigError

TOKENS, IN, OUT = 256, 192, 128


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounding_error(digits: int) -> float:
    """Root mean square error of rounding normal numbers to so many binary digits after the first.

    Of a number from 2^k to 2^(k+1) it is even within half a step of 2^(k - digits), to either side.
    """
    steps = sum(4.0**k * (below(2.0 ** (k + 1)) - below(2.0**k)) for k in range(-12, 4))
    return 2.0**-digits * math.sqrt(steps / 12)


def below(bound: float) -> float:
    """Share of normal numbers whose size is less."""
    return math.erf(bound / math.sqrt(2))


def product_error(a: int, b: int) -> float:
    """Of a product of operands with so many digits, whose errors are independent."""
    return math.hypot(rounding_error(a), rounding_error(b))


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("grouping", "grad_digits"), [("tensor", 2), ("row", 3), ("block", 3)])
def test_errors_are_those_of_the_formats(grouping, grad_digits):
    """Output and gradients are off by what rounding both operands makes them: 3.8% where both
    are e4m3, 5.9% where gradients are e5m2."""
    x = normal(TOKENS, IN, seed=0).requires_grad_()
    weight = normal(OUT, IN, seed=1).requires_grad_()
    grad = normal(TOKENS, OUT, seed=2)
    exact = F.linear(x, weight)
    exact_grads = torch.autograd.grad(exact, (x, weight), grad)
    out = quantized_linear(x, weight, grouping, emulate=True)
    grads = torch.autograd.grad(out, (x, weight), grad)
    assert relative(out, exact) == pytest.approx(product_error(3, 3), rel=0.05)
    for mine, expected in zip(grads, exact_grads, strict=True):
        assert relative(mine, expected) == pytest.approx(product_error(3, grad_digits), rel=0.05)


@pytest.mark.parametrize("grouping", ["tensor", "row", "block"])
def test_each_product_quantizes_along_its_own_sum(grouping):
    x, weight = normal(64, 96, seed=0), normal(32, 96, seed=1)
    grad = normal(64, 32, seed=2) * torch.logspace(-3, 3, 32)
    x.requires_grad_(), weight.requires_grad_()
    out = quantized_linear(x, weight, grouping, emulate=True)
    x_grad, weight_grad = torch.autograd.grad(out, (x, weight), grad)

    def rounded(t: torch.Tensor, dtype: torch.dtype = E4M3) -> torch.Tensor:
        return quantize(t.detach(), dtype, grouping).dequantize(torch.float32)

    grads = E5M2 if grouping == "tensor" else E4M3
    torch.testing.assert_close(out, rounded(x) @ rounded(weight).T)
    torch.testing.assert_close(x_grad, rounded(grad, grads) @ rounded(weight.T).T)
    torch.testing.assert_close(weight_grad, rounded(grad.T, grads) @ rounded(x.T).T)


def test_the_gradient_of_the_weight_may_be_exact():
    x, weight = normal(64, 96, seed=0), normal(32, 96, seed=1).requires_grad_()
    grad = normal(64, 32, seed=2)
    out = quantized_linear(x, weight, "row", quantize_weight_grad=False, emulate=True)
    (weight_grad,) = torch.autograd.grad(out, weight, grad)
    torch.testing.assert_close(weight_grad, grad.T @ x)


@pytest.mark.parametrize(("grouping", "unit"), [("tensor", 16), ("row", 16), ("block", 32)])
def test_tokens_that_tensor_cores_cannot_sum_over_are_refused(grouping, unit):
    x = normal(unit + 8, IN, seed=0)
    weight = normal(OUT, IN, seed=1)
    assert quantized_linear(x, weight, grouping, emulate=True).shape == (unit + 8, OUT)
    quantized_linear(x.requires_grad_(), weight, grouping, emulate=True).sum().backward()
    out = quantized_linear(x, weight.requires_grad_(), grouping, emulate=True)
    message = rf"weight of \[128, 192\] gets {unit + 8} tokens, but {unit} must divide"
    with pytest.raises(ConfigError, match=message):
        out.sum().backward()


def test_leading_dimensions_are_tokens():
    x, weight = normal(2, 16, 64, seed=0), normal(32, 64, seed=1)
    out = quantized_linear(x, weight, "row", emulate=True)
    assert out.shape == (2, 16, 32)
    flat = quantized_linear(x.view(32, 64), weight, "row", emulate=True)
    assert torch.equal(out.view(32, 32), flat)


def test_under_autocast_it_works_in_bfloat16():
    x, weight = (normal(32, 64, seed=i).requires_grad_() for i in (0, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = quantized_linear(x, weight, "tensor", emulate=True)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    as_bfloat16 = quantized_linear(x.bfloat16(), weight.bfloat16(), "tensor", emulate=True)
    assert torch.equal(out, as_bfloat16)


@pytest.mark.parametrize("grouping", ["tensor", "row"])
def test_several_layers_of_one_graph_compute_what_they_do_eagerly(grouping):
    """Of 2 x 128 tokens, so that the largest numbers of columns are looked for in strips."""
    torch._dynamo.reset()
    x = normal(2, 128, 64, seed=0).requires_grad_()
    weights = [normal(size, 64, seed=size).requires_grad_() for size in (32, 16)]

    def layers(x: torch.Tensor, weights: list[torch.Tensor]) -> list[torch.Tensor]:
        return [quantized_linear(x, weight, grouping, emulate=True) for weight in weights]

    results = []
    for run in (layers, torch.compile(layers, backend="aot_eager", fullgraph=True)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = run(x, weights)
        assert all(one.dtype == torch.bfloat16 for one in out)
        grads = torch.autograd.grad(sum(one.square().sum() for one in out), (x, *weights))
        results.append([*out, *grads])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


@pytest.mark.parametrize("strips", [False, True])
def test_strips_change_no_scale(strips):
    matrix = normal(96, 256, seed=0)
    scale = quantize(matrix, E4M3, "row", strips=strips).scale
    expected = torch.stack([quantize(row[None], E4M3, "tensor").scale[0] for row in matrix])
    assert torch.equal(scale, expected)


@pytest.mark.parametrize("grouping", ["row", "block"])
def test_experts_have_the_errors_of_linear_layers(grouping):
    rows = normal(96, 64, seed=0).requires_grad_()
    weight = normal(4, 128, 64, seed=1).requires_grad_()
    ends = torch.tensor([30, 30, 75, 96], dtype=torch.int32)
    grad = normal(96, 128, seed=2)
    exact = F.grouped_mm(rows, weight.mT, offs=ends)
    exact_grads = torch.autograd.grad(exact, (rows, weight), grad)
    out = quantized_grouped_linear(rows, weight, ends, grouping, emulate=True)
    rows_grad, weight_grad = torch.autograd.grad(out, (rows, weight), grad)
    assert relative(out, exact) == pytest.approx(product_error(3, 3), rel=0.05)
    assert relative(rows_grad, exact_grads[0]) == pytest.approx(product_error(3, 3), rel=0.05)
    torch.testing.assert_close(weight_grad, exact_grads[1])


@pytest.mark.parametrize("grouping", ["row", "block"])
def test_experts_outside_a_compiled_graph_round_in_graphs_of_their_own(grouping, monkeypatch):
    seen: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        seen.append(len(inputs))
        return graph

    torch._dynamo.reset()
    torch._dynamo.register_backend(count, name=f"count_{grouping}")
    ends = torch.tensor([10, 32], dtype=torch.int32)
    values = torch.randn(32, 64), torch.randn(2, 32, 64)

    @torch.compiler.disable  # as experts are that are dispatched to other ranks
    def product(backend: str | None) -> list[torch.Tensor]:
        rows, weight = (x.clone().requires_grad_() for x in values)
        out = quantized_grouped_linear(rows, weight, ends, grouping, True, backend)
        out.square().sum().backward()
        assert rows.grad is not None and weight.grad is not None
        return [out, rows.grad, weight.grad]

    for ours, expected in zip(product(f"count_{grouping}"), product(None), strict=True):
        assert torch.equal(ours, expected)
    assert seen, "nothing was compiled"
