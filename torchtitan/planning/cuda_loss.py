"""The chunked loss as CUDA computes it, while a step is traced on the CPU's code paths."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch

from torchtitan.components import chunked_loss


def loss_of_cuda() -> AbstractContextManager[Any]:
    """Within it, products of half precision are added to float32 without a tensor in between."""
    return patch.object(chunked_loss, "add_product", _add_product)


def _add_product(a: torch.Tensor, b: torch.Tensor, to: torch.Tensor) -> None:
    to.addmm_(a, b)  # fake tensors do not mind that dtypes differ
