"""Set parts of sharded parameters, as in models that are written for one device."""

from __future__ import annotations

import functools
from typing import Any, TypeGuard

import torch
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from torchtitan.distributed.dtensor import local_tensor, shard_offsets, whole_tensor

_aten = torch.ops.aten
_BY_SHARDS = {
    *(_aten.zero_.default, _aten.fill_.Scalar, _aten.copy_.default),
    *(_aten.detach.default, _aten.alias.default),
}
"""What DTensor does shard by shard, beside operations on each element."""
_SET_ALL = {_aten.copy_.default, _aten.fill_.Tensor, _aten.eye.out, _aten.eye.m_out}
"""What sets all elements and reads none, beside random operations."""


class WholeWeights:
    """The whole of each sharded parameter of which a part is being set.

    DTensor refuses to set a part (`weight[0] = 1`, `nn.init.sparse_`), or changes a copy, so that
    the values are lost (`weight[0].zero_()`, as `nn.Embedding` does with its `padding_idx`). So
    such operations run on the whole, and views of a parameter are views of it. A rank's shard is
    set when the next whole is made or the parameter is read: a whole lives no longer than its
    views.

    Args:
        names: of parameters, by the key of their memory; that of a whole is added.
        device: where wholes live; None: on the parameter's device.
    """

    def __init__(self, names: dict[int, str], device: torch.device | None) -> None:
        self._names = names
        self._device = device
        self._offsets = functools.cache(shard_offsets)
        self._wholes: dict[int, tuple[DTensor, torch.Tensor]] = {}  # key of the shard -> both

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operation, on wholes if need be."""
        target, tensors = target_of(func, args, kwargs), _tensors((args, kwargs))
        for tensor in tensors if self._wholes else ():
            if tensor is not target:
                self._set_shard(storage_key(tensor))
        sharded = any(isinstance(tensor, DTensor) for tensor in tensors)
        mixed = sharded and any(t.ndim and not isinstance(t, DTensor) for t in tensors)
        if self.has(target) and (mixed or self._needs_whole(func, target)):
            return self._run_on_whole(func, args, kwargs, target)
        if self._wholes and target is not None:
            self._set_shard(storage_key(target))
        if mixed:
            args, kwargs = tree_map_only(DTensor, _gathered, (args, kwargs))
        return func(*args, **kwargs)

    def has(self, tensor: torch.Tensor | None) -> TypeGuard[DTensor]:
        """Return whether it is a sharded parameter."""
        return isinstance(tensor, DTensor) and storage_key(tensor) in self._names

    def own_part(self, whole: torch.Tensor, like: DTensor) -> torch.Tensor:
        """Return this rank's part of a tensor that is sharded like another."""
        # DTensor would make the shards of all ranks, one by one, if two dimensions share rows.
        starts = self._offsets(like.shape, like.device_mesh, like.placements)
        sizes = zip(starts, like.to_local().shape, strict=True)
        return whole[tuple(slice(start, start + size) for start, size in sizes)]

    def set_shards(self) -> None:
        for key in list(self._wholes):
            self._set_shard(key)

    def _needs_whole(self, func: Any, target: DTensor) -> bool:
        """Return whether DTensor cannot work shard by shard, or views would not see the result."""
        if func not in _BY_SHARDS and torch.Tag.pointwise not in func.tags:
            return True
        return func._schema.is_mutable and self._has_views(storage_key(target))

    def _run_on_whole(self, func: Any, args: Any, kwargs: dict[str, Any], target: DTensor) -> Any:
        whole = self._whole_of(target, is_set=func in _SET_ALL or is_random(func))

        def without_shards(value: Any) -> Any:
            if value is target:
                return whole
            return _gathered(value).to(whole.device) if torch.is_tensor(value) else value

        args, kwargs = tree_map(without_shards, (args, kwargs))
        result = func(*args, **kwargs)
        return target if result is whole else result

    def _whole_of(self, target: DTensor, is_set: bool) -> torch.Tensor:
        """Return the whole of a parameter, with its values unless it `is_set` anew."""
        key = storage_key(target)
        if key not in self._wholes:
            self.set_shards()  # to have only one of them, except for views
            device = self._device or target.to_local().device
            whole = torch.empty(target.shape, dtype=target.dtype, device=device)
            if not is_set:
                whole.copy_(_gathered(target))
            self._wholes[key] = target, whole
            self._names[storage_key(whole)] = self._names[key]
        return self._wholes[key][1]

    def _set_shard(self, key: int) -> None:
        """Let the shard be this rank's part of the whole, and forget a whole without views."""
        if key not in self._wholes:
            return
        target, whole = self._wholes[key]
        target.to_local().copy_(self.own_part(whole, target))
        if not self._has_views(key):
            del self._wholes[key], self._names[storage_key(whole)]

    def _has_views(self, key: int) -> bool:
        return key in self._wholes and _uses(self._wholes[key][1]) > _uses(torch.empty(0))


def target_of(func: Any, args: Any, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Return the tensor that an operation changes, or of which it returns a view."""
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    aliased = (given.get(a.name) for a in func._schema.arguments if a.alias_info is not None)
    return next((value for value in aliased if isinstance(value, torch.Tensor)), None)


def is_random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


def storage_key(tensor: torch.Tensor) -> int:
    """Return a key of a tensor's memory, the same for `weight.data` and `weight`."""
    return local_tensor(tensor).untyped_storage()._cdata


def _gathered(tensor: torch.Tensor) -> torch.Tensor:
    # Of one that requires gradients, PyTorch before 2.13 fails to gather the values here.
    return whole_tensor(tensor.detach())


def _uses(tensor: torch.Tensor) -> int:
    """Return how many tensors (and objects of PyTorch) have the tensor's memory."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(tree) if isinstance(value, torch.Tensor)]
