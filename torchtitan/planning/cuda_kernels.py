"""Models norms, experts and the chunked loss as on CUDA, while a step is traced on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import _meta_registrations as shapes
from torch.distributed.tensor import DTensor, Partial, Shard

from torchtitan.components import chunked_loss

_rms_norm_of_cpu = F.rms_norm
_grouped_mm_of_bfloat16 = shapes._meta_grouped_mm_common


@contextmanager
def kernels_of_cuda(split: bool = False) -> Iterator[None]:
    """Replace operations that differ on CUDA, within the context. Args: as in `norm_of_cuda`."""
    with (
        norm_of_cuda(split),
        patch.object(shapes, "_meta_grouped_mm_common", _grouped_mm),
        patch.object(chunked_loss, "add_product", _add_product),
        patch.object(chunked_loss, "_compiled_between_products", _compiled_between_products),
    ):
        yield


@contextmanager
def norm_of_cuda(split: bool = False) -> Iterator[None]:
    """Make a norm one forward and one backward kernel that keeps its input, within the context.

    Args:
        split: whether backward passes are split. Before 2.13, PyTorch cannot split those of a
            `torch.autograd.Function` with a weight, so the CPU's norm stays, which keeps more.
    """
    unchanged = split and torch.__version__ < "2.13"
    with nullcontext() if unchanged else patch.object(F, "rms_norm", _rms_norm):
        yield


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


def _grouped_mm(a: torch.Tensor, b: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Take float32 too, as devices do; PyTorch's shape function refuses it (2.11 to 2.13)."""
    if a.dtype != torch.float32:
        return _grouped_mm_of_bfloat16(a, b, *args, **kwargs)
    return _grouped_mm_of_bfloat16(a.bfloat16(), b.bfloat16(), *args, **kwargs).to(a.dtype)


def _add_product(a: torch.Tensor, b: torch.Tensor, to: torch.Tensor) -> None:
    """Add a half-precision product to float32, without an intermediate tensor."""
    to.addmm_(a, b)  # fake tensors accept different dtypes


def _compiled_between_products(
    backend: str,
) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    """Return a function that only reads the logits and writes their gradient."""

    def between(logits: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        loss, grad_dtype = logits.new_zeros((), dtype=torch.float32), others[-1]
        return loss, None if grad_dtype is None else logits.to(grad_dtype, copy=True)

    return between
