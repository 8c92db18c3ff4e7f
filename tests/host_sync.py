"""Finds where a training step waits for the device, on a CPU, where there is nothing to wait for.

A tensor is taken to be on the host if it was made without naming a device, or only from such
tensors. All others are on the device: parameters, what is made on the device by name, what is
computed from it, and the batch once `Trainer._to_device` has moved it. To look at values of a
device's tensor is what CUDA would have to wait for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

_VALUES = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2"}
"""Operations whose result, or its shape, the host needs."""
_METHODS = {torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.tolist}
"""What copies to the host, and does nothing on a CPU, so that no operation tells of it."""


class HostSyncError(AssertionError):
    """The host looked at a tensor of the device."""


class NoHostSync(TorchDispatchMode):
    """Within it, a look at a device's values is a `HostSyncError`."""

    def __init__(self) -> None:
        super().__init__()
        self._host = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors(args, kwargs)
        host = bool(tensors) and self.on_host(*tensors)
        name = func.overloadpacket.__name__
        # An index of booleans is a search for those that are true, unless all get the same value.
        masks = name.startswith(("index", "_index")) and any(t.dtype == torch.bool for t in tensors)
        masks = masks and not ("index_put" in name and args[2].numel() == 1)
        repeats = name == "repeat_interleave" and kwargs.get("output_size") is None
        if not host and (name in _VALUES or masks or repeats):
            raise HostSyncError(f"{func} of a tensor on the device")
        result = func(*args, **kwargs)
        if host:
            tree_map_only(torch.Tensor, self.mark_host, result)
        return result

    def on_host(self, *tensors: torch.Tensor) -> bool:
        return all(t in self._host for t in tensors)

    def mark_host(self, tensor: torch.Tensor) -> torch.Tensor:
        self._host[tensor] = True
        return tensor

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the device."""
        moved = tensor.clone()
        self._host.pop(moved, None)
        return moved


def _tensors(args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    return [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]


class _NoCopyToHost(TorchFunctionMode):
    """What `NoHostSync` cannot see."""

    def __init__(self, mode: NoHostSync) -> None:
        super().__init__()
        self._mode = mode

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METHODS and not self._mode.on_host(args[0]):
            raise HostSyncError(f"{func.__name__}() of a tensor on the device")
        result = func(*args, **kwargs)
        made = isinstance(result, torch.Tensor) and not _tensors(args, kwargs)
        if made and kwargs.get("device") is None:
            self._mode.mark_host(result)
        return result


@contextmanager
def no_host_sync(trainer: Any) -> Iterator[None]:
    """Within it, `trainer.train_step` may not wait for the device."""
    mode = NoHostSync()
    loader, to_device = trainer.dataloader, trainer._to_device

    class HostLoader:
        def __next__(self) -> dict[str, torch.Tensor]:
            return {name: mode.mark_host(t) for name, t in next(loader).items()}

    def moving(batch: Any) -> Any:
        return tree_map_only(torch.Tensor, mode.to_device, to_device(batch))

    trainer.dataloader, trainer._to_device = HostLoader(), moving
    try:
        with _NoCopyToHost(mode), mode:
            yield
    finally:
        trainer.dataloader, trainer._to_device = loader, to_device
