"""Watches the dtypes of all tensors that a model makes."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.module_tracker import ModuleTracker

WIDE = (torch.float64, torch.complex128)
NARROW = (torch.float32, torch.bfloat16, torch.float16, torch.complex64)


class Dtypes(TorchDispatchMode):
    """Records which operations in which modules make tensors of some dtypes."""

    def __init__(self, tracker: ModuleTracker, dtypes: tuple[torch.dtype, ...]) -> None:
        super().__init__()
        self.found: dict[tuple[str, str, str], None] = {}
        self.operations = 0
        self._tracker = tracker
        self._dtypes = dtypes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.dtype in self._dtypes:
                # `parents` has the names of all enclosing modules, each a prefix of the next.
                module = max(self._tracker.parents - {"Global"}, key=len, default="the loss")
                self.found[module, str(func), str(tensor.dtype)] = None
        return result
