"""FSDP that gathers weights in float8: half of the bytes of bfloat16 travel and are held.

Each rank rounds its shard with the scale of the whole weight, so a product gets the same numbers
as if it rounded the gathered weight itself. Shards stay as they are, in high precision.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.utils._pytree import tree_map_only

from torchtitan.distributed.fsdp import fsdp_parameters

from .scaling import E4M3, Scaled, power_of_two_scale, quantize

_VIEWS = (
    torch.ops.aten.alias.default,
    torch.ops.aten.as_strided.default,
    torch.ops.aten.detach.default,
    torch.ops.aten.view.default,
)


class Float8Weight(torch.Tensor):
    """A gathered weight in float8, which for autograd and other code is a tensor of `dtype`.

    8-bit products read `float8` and `scale`; all other operations, the numbers times the scale.

    Args:
        float8: `[rows, columns]`.
        scale: float32, `[1, 1]`.
    """

    float8: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(
        cls, float8: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
    ) -> Float8Weight:
        return torch.Tensor._make_wrapper_subclass(
            cls, float8.shape, strides=float8.stride(), dtype=dtype, device=float8.device
        )

    def __init__(self, float8: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> None:
        self.float8, self.scale = float8, scale

    def scaled(self) -> Scaled:
        return Scaled(self.float8, self.scale, "tensor")

    def __repr__(self, **kwargs: Any) -> str:  # torch 2.11's compiler prints it, without numbers
        return f"Float8Weight({list(self.shape)}, {self.dtype})"

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["float8", "scale"], self.dtype

    @staticmethod
    def __tensor_unflatten__(
        parts: dict[str, torch.Tensor], dtype: torch.dtype, size: Any, stride: Any
    ) -> Float8Weight:
        return Float8Weight(parts["float8"], parts["scale"], dtype)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _VIEWS:
            weight, *rest = args
            return cls(func(weight.float8, *rest, **kwargs), weight.scale, weight.dtype)
        if func is torch.ops.aten.zeros_like.default:  # also of a weight that is not gathered now
            return func(args[0].float8, **{"dtype": args[0].dtype, **kwargs})
        args, kwargs = tree_map_only(cls, lambda w: w.scaled().dequantize(w.dtype), (args, kwargs))
        return func(*args, **kwargs)


def use_float8_gathers(model: nn.Module) -> None:
    """Let FSDP gather the weights of layers with `float8_gather` in float8.

    Call it after `fully_shard`, before the first pass. A weight that another layer shares stays in
    high precision, unless that layer is one of these, too.
    """
    scales: dict[str, _Scales] = {}
    for own in fsdp_parameters(model):
        info = own._module_info
        sharing = (info.module, *info.shared_modules)
        if info.param_name == "weight" and all(getattr(m, "float8_gather", False) for m in sharing):
            group = own.shard_mesh.get_group()
            _Gather(own, scales.setdefault(group.group_name, _Scales(group)))
    for of_group in scales.values():
        forget = torch.compiler.disable(of_group.forget)
        model.register_forward_pre_hook(forget, prepend=True)  # before FSDP's


class _Scales:
    """Scales of all weights that a model gathers from one group of ranks.

    They are found together, with one all-reduce, and each serves one gather. So that is once in a
    forward pass and once in a backward pass, and no scale is older than the pass that uses it.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.weights: list[Any] = []
        self._scales: list[torch.Tensor] = []
        """Of `weights`. They stay the same tensors, as a `Float8Weight` keeps its own."""
        self._unused: set[Any] = set()

    def forget(self, *args: Any) -> None:
        """Begin a forward pass: the weights may have changed since the last one."""
        self._unused.clear()

    def of(self, own: Any, dtype: torch.dtype) -> torch.Tensor:
        """Return the scale of a weight that is gathered now, `[1, 1]`."""
        if own not in self._unused:
            self._find(dtype)
        self._unused.remove(own)
        return self._scales[self.weights.index(own)]

    def _find(self, dtype: torch.dtype) -> None:
        shards = [own._sharded_param_data for own in self.weights]
        # The largest number of a rounded weight is the largest number, rounded.
        largest = torch.stack(torch._foreach_norm(shards, math.inf)).to(dtype).float()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._group)
        found = power_of_two_scale(largest, E4M3).view(-1, 1, 1).unbind()
        if not self._scales:
            self._scales = [torch.empty_like(scale) for scale in found]
        # Between a forward and its backward pass, which has kept them, they do not change.
        with torch.autograd._unsafe_preserve_version_counter(tuple(self._scales)):
            torch._foreach_copy_(self._scales, found)
        self._unused = set(self.weights)


class _Gather:
    """What FSDP does to a weight before and after it gathers it.

    Args:
        own: FSDP's record of the weight, an `FSDPParam`.
        scales: which it joins.
    """

    def __init__(self, own: Any, scales: _Scales) -> None:
        self._own, self._scales = own, scales
        scales.weights.append(own)
        self._init_extensions = own._init_extensions
        own._init_extensions = self._attach

    def _attach(self) -> None:
        # FSDP calls this when it begins: until then, other tensors may take the shard's place.
        shard = self._own._sharded_local_tensor
        shard.fsdp_pre_all_gather, shard.fsdp_post_all_gather = self._before, self._after
        self._init_extensions()

    def _before(
        self, mesh: Any, size: Any, stride: Any, module: nn.Module, policy: Any
    ) -> tuple[tuple[torch.Tensor], torch.Tensor]:
        """Return what to gather, and what `_after` gets as `scale`."""
        own = self._own
        dtype = policy.param_dtype or own.orig_dtype
        scale = self._scales.of(own, dtype)
        shard = own._sharded_param_data.view(own.padded_sharded_param_size).to(dtype)
        return (quantize(shard, E4M3, "tensor", scale).data.view(torch.uint8),), scale

    def _after(
        self,
        gathered: tuple[torch.Tensor],
        scale: torch.Tensor,
        dtype: torch.dtype,
        *,
        out: torch.Tensor | None = None,
    ) -> tuple[Float8Weight, tuple[()]] | None:
        if out is not None:  # made by an earlier gather, from the same memory and scale
            return None
        return Float8Weight(gathered[0].view(E4M3), scale, dtype), ()
