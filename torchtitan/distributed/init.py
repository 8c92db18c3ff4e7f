"""Initialise weights by the seed and the parameter's name alone, independent of the layout.

Parameters are initialised after they were sharded. An ordinary random number generator would give
different weights in every layout: each rank draws for its own shard, and a pipeline stage draws for
fewer layers. Here every random operation gets its own seed, derived from (seed, parameter name,
number of earlier draws for it), and a sharded parameter draws the whole tensor and keeps its part.
So two runs with the same seed can be compared step by step, whatever their layouts.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan.distributed.determinism import derive_seed
from torchtitan.distributed.dtensor import local_tensor
from torchtitan.distributed.names import canonical_name
from torchtitan.distributed.stage_copies import with_absent_modules
from torchtitan.distributed.tying import allocate
from torchtitan.distributed.whole_weights import WholeWeights, is_random, storage_key
from torchtitan.protocols.model import ModelProtocol


def set_weights(model: ModelProtocol) -> None:
    """Set all weights of a model, as on a single device.

    Every module first gets its own defaults (`reset_parameters`, in nn.MultiheadAttention
    `_reset_parameters`), inner modules before those that hold them, as their constructors would
    call it. `model.init_weights()` then overrides them.
    """
    for module in reversed(list(model.modules())):
        reset = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
        if reset is not None and not _computes_from_buffers(module):
            reset()
    model.init_weights()


def _computes_from_buffers(module: nn.Module) -> bool:
    """Return whether parameters are computed from buffers, which are not set yet (spectral_norm).

    PyTorch's `reset_parameters` would compute them, and set only the result, which is not kept.
    """
    parametrizations = getattr(module, "parametrizations", None)
    return parametrizations is not None and any(m._buffers for m in parametrizations.modules())


def initialize_weights(
    model: ModelProtocol,
    seed: int,
    device: torch.device,
    buffer_device: torch.device | None = None,
) -> None:
    """Allocate a model that is on the meta device, and set all its weights (`set_weights`).

    Args:
        device: where parameters live.
        buffer_device: where buffers live and random numbers are drawn; None: `device`. The two
            differ when parameters are offloaded to the host, where drawing would be slow and give
            other numbers.

    Raises:
        RuntimeError: a parameter or buffer is left unset (the model's bug); the message names it.
    """
    allocate(model, device)
    with torch.no_grad():
        unset = _Unset(model)
        # A shared weight is drawn for by all that have it, also in other stages.
        with with_absent_modules(model), unset, SeededInit(model, seed, buffer_device):
            set_weights(model)
        unset.refuse()
    if buffer_device is not None:
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(buffer_device))


_MAKE_ALIKE = (torch.ops.aten.new_empty.default, torch.ops.aten.empty_like.default)


class SeededInit(TorchDispatchMode):
    """Makes each random operation a function of (seed, parameter name, count), layout-independent.

    A random operation on a tensor that is no parameter (`torch.randn(...)`, or the temporaries in
    `orthogonal_`) belongs to the parameter that was last drawn for, or made a temporary of.

    Operations on a sharded parameter, or on a part of it, have the results of one process.

    Args:
        device: where to draw for parameters and buffers; None: on their own device.
    """

    def __init__(self, model: nn.Module, seed: int, device: torch.device | None = None) -> None:
        super().__init__()
        self._seed = seed
        self._device = device
        self._names = {
            storage_key(tensor): canonical_name(name)
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        }
        self._wholes = WholeWeights(self._names, device)
        self._current = ""
        self._draws: Counter[str] = Counter()

    def __exit__(self, *exc_info: Any) -> None:
        super().__exit__(*exc_info)
        self._wholes.set_shards()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        draws = is_random(func) and kwargs.get("generator") is None
        target = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if target is not None and (draws or func in _MAKE_ALIKE):
            self._current = self._names.get(storage_key(target), self._current)
        if draws:
            torch.manual_seed(self._next_seed())
        changes_parameter = func._schema.is_mutable and self._wholes.has(target)
        if draws and target is not None and not changes_parameter:
            return self._on_whole_tensor(func, args, kwargs)
        return self._wholes.run(func, args, kwargs)

    def _on_whole_tensor(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run `func` as if its first argument were not sharded, and keep this rank's part."""
        target = args[0]
        local = local_tensor(target)
        mutable = func._schema.is_mutable
        device = self._device if self._device is not None and mutable else local.device
        if not isinstance(target, DTensor) and device == local.device:
            return func(*args, **kwargs)

        full = torch.empty(target.shape, dtype=target.dtype, device=device)
        full = func(full, *args[1:], **kwargs)
        if isinstance(target, DTensor):
            if not mutable:
                where = target.device_mesh, target.placements
                return distribute_tensor(full, *where, src_data_rank=None)
            full = self._wholes.own_part(full, target)
        local.copy_(full)
        return target

    def _next_seed(self) -> int:
        count = self._draws[self._current]
        self._draws[self._current] += 1
        return derive_seed(self._seed, self._current, count)


class _Unset(TorchDispatchMode):
    """Finds the parameters and buffers that are not set while it is entered.

    Floating and complex tensors are filled with NaN, so that partly set ones are found, too. Of
    integers and booleans, it knows only whether anything was written to them.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._unwritten: dict[int, torch.Tensor] = {}  # the tensors keep keys from being reused
        for _, tensor in _local_tensors(model):
            if _holds_nan(tensor):
                tensor.fill_(float("nan"))
            else:
                self._unwritten[storage_key(tensor)] = tensor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._unwritten and func._schema.is_mutable:
            given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
            for argument in func._schema.arguments:
                tensor = given.get(argument.name)
                if argument.is_write and isinstance(tensor, torch.Tensor):
                    self._unwritten.pop(storage_key(tensor), None)
        return func(*args, **kwargs)

    def refuse(self) -> None:
        """Raise a RuntimeError that names the unset tensors, if there are any."""
        unset = [
            canonical_name(name)
            for name, tensor in _local_tensors(self._model)
            if (_holds_nan(tensor) and tensor.isnan().any())
            or (tensor.numel() and storage_key(tensor) in self._unwritten)
        ]
        if unset:
            raise RuntimeError(
                f"{type(self._model).__name__}.init_weights() leaves {len(unset)} tensors unset: "
                f"{', '.join(unset[:5])}{', ...' if len(unset) > 5 else ''}. Models are built "
                "without memory and filled afterwards, so init_weights() must set every parameter "
                "(in place: a `.data = ...` is lost) and buffer that no reset_parameters() sets"
            )


def _local_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [(name, local_tensor(t)) for name, t in tensors]


def _holds_nan(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
