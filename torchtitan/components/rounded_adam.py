"""Adam and AdamW with moments in bfloat16, as DeepSeek-V3 has them (arXiv:2412.19437, 3.3.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.optim.adam import adam

from torchtitan.distributed.dtensor import local_gradient, local_tensor

_Piece = tuple[torch.Tensor, ...]
"""Parts of a parameter, its gradient and its two moments, and its number of steps."""

_MOST_ELEMENTS = 2**25
"""Of pieces that are updated together: their moments in float32 take 256 MiB."""


class RoundedAdam(torch.optim.Adam):
    """Rounds the moments to bfloat16 after each step, whose computation is PyTorch's.

    PyTorch's kernels need moments in the dtype of the parameter (the fused one: on the CPU, and on
    CUDA before 2.12), so these are made of some parameters at a time.

    Rounding is to the nearest, so the betas must change moments by more than the spacing of
    bfloat16: see `preflight.validate`.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            states = [self._state_of(param, group["fused"]) for param in params]
            for pieces in _together(map(_with_state, params, states)):
                _update(pieces, group)
            if states:
                torch._foreach_add_([state["step"] for state in states], 1)
        return loss

    def _state_of(self, param: torch.Tensor, fused: bool) -> dict[str, Any]:
        state: dict[str, Any] = self.state[param]
        if not state:
            # On the host unless fused, as PyTorch has it.
            state["step"] = torch.zeros((), device=param.device if fused else "cpu")
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(param, dtype=torch.bfloat16)
        return state


class RoundedAdamW(RoundedAdam, torch.optim.AdamW):
    """The same with decoupled weight decay."""


def _with_state(param: torch.Tensor, state: dict[str, Any]) -> _Piece:
    moments = local_tensor(state["exp_avg"]), local_tensor(state["exp_avg_sq"])
    return local_tensor(param), local_gradient(param), *moments, state["step"]


def _together(whole: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Yield pieces that are small enough together; large parameters are cut between rows."""
    pieces: list[_Piece] = []
    size = 0
    for *tensors, step in whole:
        tensors = [torch.atleast_1d(tensor) for tensor in tensors]
        rows = len(tensors[0])
        rows = max(1, rows * _MOST_ELEMENTS // max(1, tensors[0].numel()))
        for parts in zip(*(tensor.split(rows) for tensor in tensors), strict=True):
            if pieces and size + parts[0].numel() > _MOST_ELEMENTS:
                yield pieces
                pieces, size = [], 0
            pieces.append((*parts, step))
            size += parts[0].numel()
    if pieces:
        yield pieces


def _update(pieces: list[_Piece], group: dict[str, Any]) -> None:
    params, grads, means, squares, steps = map(list, zip(*pieces, strict=True))
    kept = means + squares
    moments = [
        torch.empty_like(moment, dtype=param.dtype)
        for moment, param in zip(kept, params * 2, strict=True)
    ]
    torch._foreach_copy_(moments, kept)
    adam(
        params,
        grads,
        exp_avgs=moments[: len(params)],
        exp_avg_sqs=moments[len(params) :],
        max_exp_avg_sqs=[],
        # Copies, as this counts a step for each piece.
        state_steps=list(torch._foreach_add(steps, 0)),
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
        fused=group["fused"],
        foreach=group["foreach"],
        decoupled_weight_decay=group["decoupled_weight_decay"],
    )
    torch._foreach_copy_(kept, moments)
