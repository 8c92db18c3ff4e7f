"""Models norms as on CUDA, while a step is traced on the CPU's code paths."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, Partial, Shard

_rms_norm_of_cpu = F.rms_norm


def norm_of_cuda(split: bool = False) -> AbstractContextManager[Any]:
    """Make a norm one forward and one backward kernel that keeps its input, within the context.

    Args:
        split: whether backward passes are split. Before 2.13, PyTorch cannot split those of a
            `torch.autograd.Function` with a weight, so the CPU's norm stays, which keeps more.
    """
    if split and torch.__version__ < "2.13":
        return nullcontext()
    return patch.object(F, "rms_norm", _rms_norm)


def _rms_norm(
    x: torch.Tensor,
    normalized_shape: list[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    if torch.compiler.is_compiling() or weight is None or weight.dtype != x.dtype:
        return _rms_norm_of_cpu(x, normalized_shape, weight, eps)
    if isinstance(x, DTensor) and isinstance(weight, DTensor):
        sums = [Partial() if isinstance(p, Shard) else p for p in x.placements]  # of its gradient
        local = _Norm.apply(x.to_local(), weight.to_local(grad_placements=sums))
        return DTensor.from_local(local, x.device_mesh, x.placements, run_check=False)
    result: torch.Tensor = _Norm.apply(x, weight)
    return result


class _Norm(torch.autograd.Function):
    """Reads, writes and keeps the same number of bytes as a norm."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        factors = x.new_empty(x.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(x, weight, factors)
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.addcmul(x, grad, weight), torch.zeros_like(weight)
