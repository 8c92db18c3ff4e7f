"""Tracks the memory of tensors, real or fake, as they are created and freed."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import astuple, dataclass
from typing import Any, Self
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from torchtitan.distributed.ring_attention import sees_rings

from .recorder import Recorder


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank at one moment, by purpose."""

    parameters: float = 0
    """This rank's part, and buffers of the model."""
    gradients: float = 0
    """This rank's part."""
    optimizer_state: float = 0
    whole_parameters: float = 0
    """Parameters of other ranks gathered by FSDP, or casts of weights in a pipeline."""
    whole_gradients: float = 0
    """Gradients that FSDP has yet to scatter, between the micro-batches of a pipeline."""
    activations: float = 0
    """Kept by forward passes for backward passes."""
    pipeline_buffers: float = 0
    """Received by stages of a pipeline from their neighbours."""
    temporary: float = 0
    """Everything else."""

    @property
    def total(self) -> float:
        return sum(astuple(self))

    def __add__(self, other: Memory) -> Memory:
        return Memory(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@sees_rings
class PeakMemory(Recorder):
    """Counts the bytes of all live tensors made by operations, and their peak, while it is entered.

    A storage counts once, however many views it has, from the first time it is seen until it is
    freed. FSDP's resizing of storages is followed. Tensors that wrap others, such as DTensors, have
    no memory of their own. PyTorch's `MemTracker` is not used because it counts a DTensor's
    optimizer state in its global size (seen with torch 2.13).
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self.resized: set[int] = set()
        """Numbers of the storages that were resized: those that FSDP gathers into."""
        self._sizes: dict[int, int] = {}  # address -> bytes
        self._numbers: dict[int, int] = {}  # address -> number; addresses are reused
        self._seen = 0
        self._events: list[tuple[int, int]] = []  # number, change in bytes
        self._start: dict[int, int] = {}  # before the events: number -> bytes
        self._peak_at = 0  # number of events up to the peak

    def add(self, *tensors: torch.Tensor) -> None:
        """Count tensors that exist already, such as parameters."""
        for tensor in tensors:
            for plain in _plain(tensor):
                self._see(plain.untyped_storage())

    def reset_peak(self) -> None:
        """Forget the peak so far."""
        self.peak, self._peak_at = self.current, 0
        self._start, self._events = self.live(), []

    def live(self) -> dict[int, int]:
        """Return number -> bytes of each live storage. A number is never reused."""
        return {self._numbers[address]: size for address, size in self._sizes.items()}

    def live_at_peak(self) -> dict[int, int]:
        """Return `live()` at the peak since the last reset."""
        sizes = Counter(self._start)
        for number, change in self._events[: self._peak_at]:
            sizes[number] += change
        return sizes

    def record(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and not is_traceable_wrapper_subclass(leaf):
                self._see(leaf.untyped_storage())

    def __enter__(self) -> Self:
        original = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = original(storage, size)
            if storage._cdata in self._sizes:
                self.resized.add(self._numbers[storage._cdata])
                self._set(storage._cdata, storage.nbytes())
            return result

        self._resizing = patch.object(torch.UntypedStorage, "resize_", resize_)
        self._resizing.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._resizing.stop()
        super().__exit__(*error)

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            weakref.finalize(storage, self._forget, key).atexit = False
            self._numbers[key] = self._seen
            self._seen += 1
        self._set(key, storage.nbytes())

    def _set(self, key: int, size: int) -> None:
        change = size - self._sizes.get(key, 0)
        self._sizes[key] = size
        if not change:
            return
        self.current += change
        self._events.append((self._numbers[key], change))
        if self.current > self.peak:
            self.peak, self._peak_at = self.current, len(self._events)

    def _forget(self, key: int) -> None:
        size = self._sizes.pop(key)
        self.current -= size
        self._events.append((self._numbers.pop(key), -size))


def _plain(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors that hold the memory of `tensor`."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    return [plain for t in inner if isinstance(t, torch.Tensor) for plain in _plain(t)]
