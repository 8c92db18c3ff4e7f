"""Follows the memory of tensors, real or fake, as they come and go."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Within it, counts the bytes of all live tensors that operations make, and their peak.

    A storage counts once, however many views it has, from its first sight until it is freed, and
    FSDP's resizing of storages is followed. Tensors that wrap others, such as DTensors, have no
    memory of their own. PyTorch's `MemTracker` counts a DTensor's optimizer state in its global
    size (seen with torch 2.13), hence this one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}
        self._paused = False

    def add(self, *tensors: torch.Tensor) -> None:
        """Count tensors that exist already, such as parameters."""
        for tensor in tensors:
            for plain in _plain(tensor):
                self._see(plain.untyped_storage())

    def reset_peak(self) -> None:
        """Forget what was before."""
        self.peak = self.current

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if DTensor in types:
            return NotImplemented  # it comes back with the operations on its parts
        result = func(*args, **(kwargs or {}))
        for leaf in [] if self._paused else tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and not is_traceable_wrapper_subclass(leaf):
                self._see(leaf.untyped_storage())
        return result

    def __enter__(self) -> PeakMemory:
        original = self._original_resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = original(storage, size)
            if storage._cdata in self._sizes:
                self._set(storage._cdata, storage.nbytes())
            return result

        torch.UntypedStorage.resize_ = resize_
        # DTensor works out shapes with fake tensors of global size, which have no memory.
        propagate = self._original_propagate = ShardingPropagator._propagate_tensor_meta_non_cached

        def propagate_unseen(*args: Any, **kwargs: Any) -> Any:
            self._paused = True
            try:
                return propagate(*args, **kwargs)
            finally:
                self._paused = False

        ShardingPropagator._propagate_tensor_meta_non_cached = propagate_unseen
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._original_resize
        ShardingPropagator._propagate_tensor_meta_non_cached = self._original_propagate
        super().__exit__(*error)

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            weakref.finalize(storage, self._forget, key).atexit = False
        self._set(key, storage.nbytes())

    def _set(self, key: int, size: int) -> None:
        self.current += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.peak = max(self.peak, self.current)

    def _forget(self, key: int) -> None:
        self.current -= self._sizes.pop(key)


def _plain(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that hold the memory of `tensor`."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    return [plain for t in inner if isinstance(t, torch.Tensor) for plain in _plain(t)]
