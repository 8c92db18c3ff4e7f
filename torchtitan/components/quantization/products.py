"""Differentiable matrix products of quantized operands, for linear layers and experts."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from torchtitan.errors import ConfigError

from .float8_gather import Float8Weight
from .scaling import (
    E4M3,
    E5M2,
    MX_BLOCK,
    Grouping,
    Scaled,
    quantize,
    scaled_grouped_mm,
    scaled_mm,
)


def quantized_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    grouping: Grouping,
    quantize_weight_grad: bool = True,
    emulate: bool = False,
    weight_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute `F.linear(x, weight)` and its gradients with operands rounded to float8.

    The operands of each product are quantized along the dimension that is summed over: input
    features (forward), output features (gradient of `x`) or tokens (gradient of `weight`). Under
    autocast, they are first cast to its dtype, as in `F.linear`.

    Args:
        x: `[..., in]`.
        weight: `[out, in]`; a `Float8Weight` is rounded already, with `weight_scale` `[1, 1]`.
        grouping: which elements share a scale.
        quantize_weight_grad: False computes the gradient of the weight in high precision.
        emulate: see `scaled_mm`.

    Returns:
        `[..., out]` in the dtype of `x`.
    """
    x, weight = _autocast(x, weight)
    rows = x.reshape(-1, x.size(-1))
    args = grouping, quantize_weight_grad, emulate, weight_scale
    out = _QuantizedLinear.apply(rows, weight, *args)
    return out.view(*x.shape[:-1], weight.size(0))


class _QuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        grouping: Grouping,
        quantize_weight_grad: bool,
        emulate: bool,
        weight_scale: Any,
    ) -> torch.Tensor:
        ctx.grouping, ctx.emulate = grouping, emulate
        ctx.quantize_weight_grad = quantize_weight_grad
        with torch.autocast(x.device.type, enabled=False):
            rows = quantize(x, E4M3, grouping)
            if isinstance(weight, Float8Weight):
                matrix = Scaled(weight.view(E4M3), weight_scale, grouping)
            else:
                matrix = quantize(weight, E4M3, grouping)
            # A tensor-wide scale is also that of the transpose, so backward can reuse it.
            scales = [rows.scale, matrix.scale] if grouping == "tensor" else []
            ctx.save_for_backward(x, weight, *scales)
            return scaled_mm(rows, matrix, x.dtype, emulate, fast=True)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, *saved = ctx.saved_tensors
        scales: Any = saved or (None, None)
        x_scale, weight_scale = scales
        grouping, emulate = ctx.grouping, ctx.emulate
        # Gradients have a wider range. Smaller groups fit e4m3, which has more mantissa bits.
        grad_dtype = E5M2 if grouping == "tensor" else E4M3
        x_grad = weight_grad = grad_scale = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                both_ways = ctx.needs_input_grad[1] and ctx.quantize_weight_grad
                rows = quantize(grad, grad_dtype, grouping, strips=both_ways)
                grad_scale = rows.scale if grouping == "tensor" else None
                if isinstance(weight, Float8Weight):
                    matrix = Scaled(weight.view(E4M3).T, weight_scale, grouping)
                else:
                    matrix = quantize(weight.T, E4M3, grouping, weight_scale, strips=True)
                x_grad = scaled_mm(rows, matrix, x.dtype, emulate)
            if ctx.needs_input_grad[1] and ctx.quantize_weight_grad:
                _require_multiple(len(grad), grouping, weight)
                columns = quantize(grad.T, grad_dtype, grouping, grad_scale, strips=True)
                matrix = quantize(x.T, E4M3, grouping, x_scale, strips=True)
                weight_grad = scaled_mm(columns, matrix, x.dtype, emulate)
            elif ctx.needs_input_grad[1]:
                weight_grad = grad.T @ x
        return x_grad, weight_grad, None, None, None, None


def _require_multiple(tokens: int, grouping: Grouping, weight: torch.Tensor) -> None:
    unit = MX_BLOCK if grouping == "block" else 16
    if tokens % unit:
        raise ConfigError(
            f"a linear layer with a weight of {list(weight.shape)} gets {tokens} tokens, but "
            f"{unit} must divide their number, as the gradient of its weight is a sum over them in "
            "8 bits. Change the number, or name the layer in filter_fqns of its converter"
        )


def quantized_grouped_linear(
    rows: torch.Tensor,
    weight: torch.Tensor,
    ends: torch.Tensor,
    grouping: Grouping,
    emulate: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Compute `grouped_linear` of `torchtitan.models.common.moe` with operands rounded to float8.

    The gradient of the weights is computed in high precision: it sums over the rows of an expert.
    Only the device knows their number, and products in 8 bits need multiples of 16.

    Args:
        rows: `[rows, in]`, sorted by expert.
        weight: `[num_experts, out, in]`.
        ends: where each expert's rows end, `[num_experts]` int32.
        grouping: `row` or `block`.
        emulate: see `scaled_mm`.
        backend: `torch.compile` backend of the rounding if the call is not in a compiled graph, as
            for experts dispatched to other ranks. None leaves it eager.

    Returns:
        `[rows, out]`.
    """
    rows, weight = _autocast(rows, weight)
    return _QuantizedGroupedLinear.apply(rows, weight, ends, grouping, emulate, backend)


class _QuantizedGroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        ends: torch.Tensor,
        grouping: Grouping,
        emulate: bool,
        backend: str | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(rows, weight, ends)
        ctx.grouping, ctx.emulate, ctx.backend = grouping, emulate, backend
        with torch.autocast(rows.device.type, enabled=False):
            a = _quantize_alone(rows, grouping, backend)
            b = _quantize_alone(weight, grouping, backend)
            return scaled_grouped_mm(a, b, ends, rows.dtype, emulate)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight, ends = ctx.saved_tensors
        rows_grad = weight_grad = None
        with torch.autocast(rows.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                a = _quantize_alone(grad, ctx.grouping, ctx.backend)
                b = _quantize_alone(weight.mT, ctx.grouping, ctx.backend)
                rows_grad = scaled_grouped_mm(a, b, ends, rows.dtype, ctx.emulate)
            if ctx.needs_input_grad[1]:
                weight_grad = F.grouped_mm(grad.contiguous().mT, rows, offs=ends)
        return rows_grad, weight_grad, None, None, None, None


def _quantize_alone(tensor: torch.Tensor, grouping: Grouping, backend: str | None) -> Scaled:
    """Quantize to e4m3, compiled separately unless the surrounding code is being compiled."""
    if backend is None or torch.compiler.is_compiling():
        return quantize(tensor, E4M3, grouping)
    data, scale = _compiled_quantize(backend)(tensor, grouping)
    return Scaled(data, scale, grouping)


@cache
def _compiled_quantize(backend: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    def parts(tensor: torch.Tensor, grouping: Grouping) -> tuple[torch.Tensor, torch.Tensor]:
        scaled = quantize(tensor, E4M3, grouping)
        # Products need contiguous data; the compiler writes a transpose in this order directly.
        return scaled.data.contiguous(), scaled.scale

    # The number of rows of a rank changes with each batch.
    return torch.compile(parts, backend=backend, dynamic=True)


def _autocast(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cast both to autocast's dtype if it is on, since autocast ignores custom functions."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return x, weight
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), weight.to(dtype)
