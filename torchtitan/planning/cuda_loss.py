"""Models the chunked loss as on CUDA, while a step is traced on the CPU's code paths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from torchtitan.components import chunked_loss


@contextmanager
def loss_of_cuda() -> Iterator[None]:
    """Replace the kernels around the chunked loss's products, within the context.

    Half-precision products are added to float32 without an intermediate tensor, and the compiled
    code between products only reads the logits and writes their gradient.
    """
    with (
        patch.object(chunked_loss, "add_product", _add_product),
        patch.object(chunked_loss, "_compiled_between_products", _compiled_between_products),
    ):
        yield


def _add_product(a: torch.Tensor, b: torch.Tensor, to: torch.Tensor) -> None:
    to.addmm_(a, b)  # fake tensors accept different dtypes


def _compiled_between_products(
    backend: str,
) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    def between(logits: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        loss, grad_dtype = logits.new_zeros((), dtype=torch.float32), others[-1]
        return loss, None if grad_dtype is None else logits.to(grad_dtype, copy=True)

    return between
