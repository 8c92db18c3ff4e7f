"""Makes a process compute in float64, in which the layouts of a model differ by 1e-13 of a number.

In float32 they differ by 1e-6, since each adds up in another order. That hides small mistakes, such
as a loss of little weight that each rank adds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F


@contextmanager
def in_float64() -> Iterator[None]:
    """Make the names of all narrower dtypes mean float64, in the whole process.

    So weights, optimizers and losses are float64, and casts to float32 or bfloat16 do nothing.
    Modules that are imported within the context, or ask for a dtype when they run, follow.
    """
    torch.storage._dtype_to_storage_type_map()  # computed once, from the real dtypes
    names = ("float32", "float", "bfloat16", "float16", "half")
    dtypes: dict[str, Any] = dict.fromkeys(names, torch.float64)
    dtypes |= dict.fromkeys(("complex64", "cfloat"), torch.complex128)
    casts: dict[str, Any] = dict.fromkeys(("float", "bfloat16", "half"), torch.Tensor.double)
    with (
        default_float64(),
        patch.multiple(torch, **dtypes),
        patch.multiple(torch.Tensor, **casts),
        patch.object(F, "grouped_mm", grouped_mm),
    ):
        yield


@contextmanager
def default_float64() -> Iterator[None]:
    """Make float64 the dtype of new tensors, within the context."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def grouped_mm(
    a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor | None = None, *unused: Any, **others: Any
) -> torch.Tensor:
    """Replace `torch._grouped_mm`, whose kernels lack float64: `[rows, k]` by `[groups, k, n]`; or
    `[m, rows]` by `[rows, n]`, which gives `[groups, m, n]`."""
    if offs is None:
        return a @ b
    ends = offs.tolist()
    parts = [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
    if b.ndim == 2:
        return torch.stack([a[..., part] @ b[part] for part in parts])
    out = a.new_zeros(a.shape[0], b.shape[-1])
    for group, part in enumerate(parts):
        out[part] = a[part] @ b[group]
    return out
