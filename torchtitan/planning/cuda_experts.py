"""Models the products of experts as on CUDA, while a step is traced on fake tensors."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch
from torch import _meta_registrations as shapes

_shape_in_bfloat16 = shapes._meta_grouped_mm_common


def experts_of_cuda() -> AbstractContextManager[Any]:
    """Make fake tensors take `grouped_mm` in float32, as devices do, within the context.

    PyTorch's shape function refuses it (2.11 to 2.13).
    """
    return patch.object(shapes, "_meta_grouped_mm_common", _shape)


def _shape(a: torch.Tensor, b: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if a.dtype != torch.float32:
        return _shape_in_bfloat16(a, b, *args, **kwargs)
    return _shape_in_bfloat16(a.bfloat16(), b.bfloat16(), *args, **kwargs).to(a.dtype)
