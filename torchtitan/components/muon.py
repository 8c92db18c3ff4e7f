"""Muon for sharded parameters: orthogonalize the momentum matrix before each update."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple, cast

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import ParamsT

from torchtitan.components.matrix_exchange import Cut, Dim, MatrixExchange, exchanged_dims
from torchtitan.distributed.dtensor import local_gradient, local_tensor

_Param = tuple[torch.Tensor, dict[str, Any]]
"""A parameter and the options of its group."""

_Spread = tuple[MatrixExchange, list[Cut]]
"""Exchanges matrices that several ranks have parts or copies of, and the layout of each."""


class _Matrix(NamedTuple):
    """A matrix of which several ranks have parts or copies."""

    values: torch.Tensor
    """This rank's part."""
    update: torch.Tensor
    param: torch.Tensor
    """The matrix, or the stack that has it."""
    group: dict[str, Any]


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

    A parameter of three dimensions is a stack of matrices, such as experts, each of which moves by
    itself. What a rank has whole, it orthogonalizes without communication.

    All ranks of a mesh call `step` together, whichever gradients they have. Parameters without a
    gradient stay unchanged.

    Args:
        params: matrices `[rows, columns]` and stacks `[matrices, rows, columns]`, or groups of
            them.
        lr: learning rate before the adjustment for the shape.
        momentum: decay of the running mean of gradients.
        weight_decay: scaled with `lr`.
        state_dtype: of the momentum between steps. Default: that of the parameter.

    Raises:
        ValueError: a parameter is neither a matrix nor a stack.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        self._state_dtype = state_dtype
        self._spreads: dict[torch.Tensor, _Spread | None] = {}
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._spreads.clear()
        for param in self.param_groups[-1]["params"]:
            if param.ndim not in (2, 3):
                raise ValueError(
                    "Muon needs matrices or stacks of them, but the parameter has shape "
                    f"{list(param.shape)}"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        shared: dict[MatrixExchange, list[_Param]] = defaultdict(list)
        for group in self.param_groups:
            for param in group["params"]:
                if spread := self._spread_of(param):
                    shared[spread[0]].append((param, group))
                else:
                    update = self._momentum(param, group["momentum"])
                    if isinstance(param, DTensor):
                        update = update.to(param.device_mesh.device_type)  # if offloaded
                    self._move(local_tensor(param), orthogonalize(update), param, group)
        for exchange, params in shared.items():
            self._step_shared(exchange, params)
        return loss

    def _spread_of(self, param: torch.Tensor) -> _Spread | None:
        """Return how the matrices of a parameter are spread; None if those of this rank are whole.

        They are looked up by parameter: FSDP makes a mesh for each, and comparing two that are
        equal takes 0.5 ms with 8,000 ranks.
        """
        if not self._spreads:
            exchanges: dict[tuple[DeviceMesh, tuple[Dim, ...], int], MatrixExchange] = {}
            for each in (each for group in self.param_groups for each in group["params"]):
                self._spreads[each] = None
                if isinstance(each, DTensor) and (dims := exchanged_dims(each)):
                    key = each.device_mesh, dims, each.ndim
                    if key not in exchanges:
                        exchanges[key] = MatrixExchange(each.device_mesh, dims)
                    self._spreads[each] = exchanges[key], exchanges[key].layout(each)
        return self._spreads[param]

    def _step_shared(self, exchange: MatrixExchange, params: list[_Param]) -> None:
        """Update the matrices of all parameters of an exchange together, to keep ranks busy."""
        # Matrices processed in parallel should take about the same time.
        params.sort(key=lambda param: param[0].shape[-2:].numel(), reverse=True)
        stacked = params[0][0].ndim == 3
        function = _orthogonalize_as_in_a_stack if stacked else orthogonalize
        matrices = self._matrices(params)
        while chunk := list(islice(matrices, exchange.ranks)):
            layouts = [cast(_Spread, self._spreads[matrix.param])[1] for matrix in chunk]
            directions = exchange.apply(function, layouts, [matrix.update for matrix in chunk])
            for matrix, direction in zip(chunk, directions, strict=True):
                self._move(matrix.values, direction, matrix.param, matrix.group)

    def _matrices(self, params: list[_Param]) -> Iterator[_Matrix]:
        """Yield the matrices of parameters, one at a time, since their updates need memory."""
        for param, group in params:
            values, update = local_tensor(param), self._momentum(param, group["momentum"])
            if param.ndim == 2:
                yield _Matrix(values, update, param, group)
            else:
                for pair in zip(values, update, strict=True):
                    yield _Matrix(*pair, param, group)

    def _momentum(self, param: torch.Tensor, momentum: float) -> torch.Tensor:
        """Update the running mean; return this rank's part of the Nesterov update in bfloat16.

        Without a gradient the update is zero and the mean unchanged, so that all ranks always
        exchange the same matrices.
        """
        state = self.state[param]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(param, dtype=self._state_dtype)
        buffer = local_tensor(state["momentum_buffer"])
        if param.grad is None:
            return torch.zeros_like(buffer, dtype=torch.bfloat16)
        grad, mean = local_gradient(param), buffer.to(param.dtype)
        mean.lerp_(grad, 1 - momentum)
        if mean is not buffer:
            buffer.copy_(mean)
        return grad.lerp(mean, momentum).bfloat16()

    def _move(
        self,
        values: torch.Tensor,
        direction: torch.Tensor,
        param: torch.Tensor,
        group: dict[str, Any],
    ) -> None:
        """Move `values`, this rank's part of a parameter or of one matrix of it."""
        if param.grad is None:
            return
        rows, columns = param.shape[-2:]
        values.mul_(1 - group["lr"] * group["weight_decay"])
        lr = group["lr"] * math.sqrt(max(1, rows / columns))
        values.add_(direction.to(values.device), alpha=-lr)


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """Approximate `U V^T` of the matrix `U S V^T` by Newton-Schulz iteration in bfloat16.

    The singular values of the result lie between about 0.5 and 1.5, which works as well as 1.

    Args:
        matrix: `[rows, columns]`, or a stack of them, `[matrices, rows, columns]`.

    Returns:
        The same shape, bfloat16.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    x = matrix.bfloat16()
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    add_product = torch.addmm if x.ndim == 2 else torch.baddbmm
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = add_product(x, add_product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _orthogonalize_as_in_a_stack(matrix: torch.Tensor) -> torch.Tensor:
    """Use the kernels of stacks, so that the result does not depend on who has which matrices."""
    return orthogonalize(matrix[None])[0]
