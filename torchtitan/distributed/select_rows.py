"""Reorder the rows of a matrix."""

from __future__ import annotations

from typing import Any

import torch


def inverse_permutation(order: torch.Tensor) -> torch.Tensor:
    """Return `place` with `place[order[i]] = i`; both `[n]` int64."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def select_rows(
    x: torch.Tensor, order: torch.Tensor, place: torch.Tensor, copies: int = 1
) -> torch.Tensor:
    """Return row `order[i] // copies` of `x` `[n, dim]` for each i: `[n * copies, dim]`.

    `order` is a permutation, and `place` its inverse. Unlike with PyTorch's indexing, the gradients
    are gathered too, not scattered: they are deterministic, and fast on a GPU.
    """
    return _SelectRows.apply(x, order, place, copies)


class _SelectRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, order: torch.Tensor, place: torch.Tensor, copies: int
    ) -> torch.Tensor:
        ctx.save_for_backward(place)
        ctx.copies = copies
        return x.index_select(0, order // copies if copies > 1 else order)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        grad = grad.index_select(0, place)
        if ctx.copies > 1:
            grad = grad.unflatten(0, (-1, ctx.copies)).sum(dim=1)
        return grad, None, None, None
