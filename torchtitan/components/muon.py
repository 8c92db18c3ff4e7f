"""Muon: momentum whose matrix is replaced by the nearest orthogonal one, on sharded parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate

NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic that takes singular values in (0, 1] to about 1 (Keller Jordan, Muon, 2024)."""


class Muon(torch.optim.Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon/) with Nesterov momentum.

    Computes what `torch.optim.Muon` does with its default learning-rate adjustment: a matrix
    `[rows, columns]` moves by `lr * sqrt(max(1, rows / columns))` times an orthogonal matrix, and
    weight decay is decoupled. It differs in how it treats DTensors. Orthogonalising needs the whole
    matrix, which `torch.optim.Muon` communicates about in each of its bfloat16 products, so that
    the result depends on the layout. Here each matrix is gathered once, the ranks that share
    parameters orthogonalise one matrix each at a time, and tell one another the results.

    Args:
        params: matrices, or groups of them that lie on one mesh each.
        lr: learning rate, before the adjustment for the shape.
        momentum: decay of the running mean of gradients.
        weight_decay: decoupled, scaled with `lr`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            at_once = _sharing_ranks(params[0])[1] if params else 1
            for start in range(0, len(params), at_once):
                self._step_together(params[start : start + at_once], group)
        return loss

    def _step_together(self, params: list[torch.Tensor], group: dict[str, Any]) -> None:
        """Update at most as many matrices as ranks share them: each rank orthogonalises one."""
        rank, ranks, process_group = _sharing_ranks(params[0])
        updates = [_gather(self._momentum(param, group["momentum"])) for param in params]
        if rank < len(params):
            updates[rank] = orthogonalize(updates[rank])
        for owner, (param, update) in enumerate(zip(params, updates, strict=True)):
            if ranks > 1:
                dist.broadcast(update, group=process_group, group_src=owner)
            rows, columns = param.shape
            param.mul_(1 - group["lr"] * group["weight_decay"])
            param.add_(
                _scatter_like(update, param), alpha=-group["lr"] * math.sqrt(max(1, rows / columns))
            )

    def _momentum(self, param: torch.Tensor, momentum: float) -> torch.Tensor:
        """Add the gradient to the running mean; the Nesterov update, in bfloat16."""
        state = self.state[param]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(param.grad)
        buffer = state["momentum_buffer"].lerp_(param.grad, 1 - momentum)
        return param.grad.lerp(buffer, momentum).bfloat16()


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """About `U V^T` of the matrix `U S V^T`, by Newton-Schulz iteration in bfloat16.

    The singular values of the result are between about 0.7 and 1.2, which serves as well as 1.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    x = matrix.bfloat16()
    tall = x.size(0) > x.size(1)
    if tall:
        x = x.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).contiguous()


def _sharing_ranks(param: torch.Tensor) -> tuple[int, int, dist.ProcessGroup | None]:
    """Rank, number and group of the ranks along the longest dimension of the parameter's mesh."""
    if not isinstance(param, DTensor):
        return 0, 1, None
    mesh = param.device_mesh
    dim = max(range(mesh.ndim), key=mesh.size)
    return mesh.get_local_rank(dim), mesh.size(dim), mesh.get_group(dim)


def _gather(update: torch.Tensor) -> torch.Tensor:
    return update.full_tensor() if isinstance(update, DTensor) else update


def _scatter_like(full: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that all ranks hold; communicates nothing."""
    if not isinstance(param, DTensor):
        return full
    mesh = param.device_mesh
    replicated = DTensor.from_local(full, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(placements=param.placements)
