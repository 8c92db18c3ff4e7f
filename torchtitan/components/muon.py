"""Muon for sharded parameters: orthogonalize the momentum matrix before each update."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import ParamsT

from torchtitan.components.matrix_exchange import MatrixExchange
from torchtitan.distributed.dtensor import local_tensor

_Matrix = tuple[torch.Tensor, dict[str, Any]]
"""A parameter and the options of its group."""

NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic that maps singular values in (0, 1] to about 1 (Keller Jordan, Muon,
2024)."""


class Muon(torch.optim.Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon/) with Nesterov momentum.

    Computes the same update as `torch.optim.Muon` with its default learning-rate adjustment: a
    matrix `[rows, columns]` moves by `lr * sqrt(max(1, rows / columns))` times an orthogonal
    matrix, and weight decay is decoupled. Only the handling of DTensors differs.
    `torch.optim.Muon` communicates in each bfloat16 product, so its result depends on the layout,
    and all ranks repeat the same work. Here one rank gathers each matrix and orthogonalizes it.

    All ranks of a mesh call `step` together, whichever gradients they have. Parameters without a
    gradient stay unchanged.

    Args:
        params: matrices, or groups of them.
        lr: learning rate before the adjustment for the shape.
        momentum: decay of the running mean of gradients.
        weight_decay: scaled with `lr`.

    Raises:
        ValueError: a parameter is not a matrix.
    """

    def __init__(
        self, params: ParamsT, lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.1
    ) -> None:
        self._exchanges: dict[DeviceMesh, MatrixExchange] = {}
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._exchanges.clear()
        for param in self.param_groups[-1]["params"]:
            if param.ndim != 2:
                raise ValueError(
                    f"Muon needs matrices, but the parameter has shape {list(param.shape)}"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        by_mesh: dict[DeviceMesh | None, list[_Matrix]] = {}
        for group in self.param_groups:
            for param in group["params"]:
                by_mesh.setdefault(_mesh(param), []).append((param, group))
        for mesh, matrices in by_mesh.items():
            if mesh is not None:
                self._step_sharded(mesh, matrices)
                continue
            for param, group in matrices:
                direction = orthogonalize(self._momentum(param, group["momentum"]))
                self._move(param, direction, group)
        return loss

    def _step_sharded(self, mesh: DeviceMesh, matrices: list[_Matrix]) -> None:
        """Update the matrices of all groups on one mesh together, to keep the most ranks busy."""
        exchange = self._exchanges.get(mesh)
        if exchange is None:
            exchange = MatrixExchange([cast(DTensor, param) for param, _ in matrices])
            self._exchanges[mesh] = exchange
        # Matrices processed in parallel should take about the same time.
        matrices.sort(key=lambda matrix: matrix[0].numel(), reverse=True)
        for start in range(0, len(matrices), exchange.ranks):
            chunk = matrices[start : start + exchange.ranks]
            local = [self._momentum(param, group["momentum"]) for param, group in chunk]
            params = [cast(DTensor, param) for param, _ in chunk]
            directions = exchange.apply(orthogonalize, params, local)
            for (param, group), direction in zip(chunk, directions, strict=True):
                self._move(param, direction, group)

    def _momentum(self, param: torch.Tensor, momentum: float) -> torch.Tensor:
        """Update the running mean; return this rank's part of the Nesterov update in bfloat16.

        Without a gradient the update is zero and the mean unchanged, so that all ranks always
        exchange the same matrices.
        """
        state = self.state[param]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(param)
        buffer = local_tensor(state["momentum_buffer"])
        if param.grad is None:
            return torch.zeros_like(buffer, dtype=torch.bfloat16)
        grad = param.grad
        if isinstance(grad, DTensor):  # it may be a partial sum
            grad = grad.redistribute(placements=cast(DTensor, param).placements).to_local()
        buffer.lerp_(grad, 1 - momentum)
        return grad.lerp(buffer, momentum).bfloat16()

    def _move(self, param: torch.Tensor, direction: torch.Tensor, group: dict[str, Any]) -> None:
        if param.grad is None:
            return
        rows, columns = param.shape
        local = local_tensor(param)
        local.mul_(1 - group["lr"] * group["weight_decay"])
        lr = group["lr"] * math.sqrt(max(1, rows / columns))
        local.add_(direction.to(local.device), alpha=-lr)


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """Approximate `U V^T` of the matrix `U S V^T` by Newton-Schulz iteration in bfloat16.

    The singular values of the result lie between about 0.5 and 1.5, which works as well as 1.

    Args:
        matrix: `[rows, columns]`.

    Returns:
        `[rows, columns]` bfloat16.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    x = matrix.bfloat16()
    tall = x.size(0) > x.size(1)
    if tall:
        x = x.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _mesh(param: torch.Tensor) -> DeviceMesh | None:
    return param.device_mesh if isinstance(param, DTensor) else None
