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

from torchtitan.distributed.fsdp import parameter_groups
from torchtitan.errors import ConfigError

from .scaling import E4M3, power_of_two_scale, quantize

_VIEWS = (
    torch.ops.aten.alias.default,
    torch.ops.aten.as_strided.default,
    torch.ops.aten.detach.default,
    torch.ops.aten.view.default,
)


class Float8Weight(torch.Tensor):
    """A gathered weight in float8, which for autograd is a tensor of `dtype`.

    `view(torch.float8_e4m3fn)` gives its numbers, which lack the scale. It can do nothing else.

    Args:
        float8: `[rows, columns]`.
    """

    # The only tensor in it. If there were two, the compiler of torch 2.13 would mistake the places
    # of parameters among its inputs, and keep weights for the backward pass.
    float8: torch.Tensor

    @staticmethod
    def __new__(cls, float8: torch.Tensor, dtype: torch.dtype) -> Float8Weight:
        return torch.Tensor._make_wrapper_subclass(
            cls, float8.shape, strides=float8.stride(), dtype=dtype, device=float8.device
        )

    def __init__(self, float8: torch.Tensor, dtype: torch.dtype) -> None:
        self.float8 = float8

    def __repr__(self) -> str:  # type: ignore[override]
        # The compiler of torch 2.11 prints one that has no numbers.
        return f"Float8Weight({list(self.shape)}, {self.dtype})"

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["float8"], self.dtype

    @staticmethod
    def __tensor_unflatten__(
        parts: dict[str, torch.Tensor], dtype: torch.dtype, size: Any, stride: Any
    ) -> Float8Weight:
        return Float8Weight(parts["float8"], dtype)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, weight = kwargs or {}, args[0]
        if func in _VIEWS:
            return cls(func(weight.float8, *args[1:], **kwargs), weight.dtype)
        if func is torch.ops.aten.view.dtype and args[1] == E4M3:
            return weight.float8
        if func is torch.ops.aten.zeros_like.default:  # for one without a gradient
            return func(weight.float8, **{"dtype": weight.dtype, **kwargs})
        raise ConfigError(
            "quantize.linear.float8.enable_fsdp_float8_all_gather: a model uses a weight outside "
            f"of its layer ({func}), which only has it in float8. Set the key to false, or name "
            "the layer in quantize.linear.float8.filter_fqns"
        )


def use_float8_gathers(model: nn.Module) -> None:
    """Let FSDP gather the weights of layers with `float8_gather` in float8.

    Call it after `fully_shard`, before the first pass. A weight that another layer shares stays in
    high precision, unless that layer is one of these, too.
    """
    scales: dict[str, _Scales] = {}
    for group in parameter_groups(model):
        for own in group.fsdp_params:
            info = own._module_info
            layers: list[Any] = [info.module, *info.shared_modules]
            converted = all(getattr(layer, "float8_gather", False) for layer in layers)
            if info.param_name == "weight" and converted:
                ranks = own.shard_mesh.get_group()
                of_ranks = scales.setdefault(ranks.group_name, _Scales(ranks))
                of_ranks.gathers.append(_Gather(own, layers, of_ranks))
                of_ranks.groups[group] = None
    for of_ranks in scales.values():
        forget = torch.compiler.disable(of_ranks.forget)
        model.register_forward_pre_hook(forget, prepend=True)  # before FSDP's


class _Scales:
    """Finds the scales of all weights that a model gathers from one group of ranks.

    They are found together, with one all-reduce, and each serves one gather. So that is once in a
    forward pass and once in a backward pass, and no scale is older than the pass that uses it.
    """

    def __init__(self, ranks: dist.ProcessGroup) -> None:
        self._ranks = ranks
        self.gathers: list[_Gather] = []
        self.groups: dict[Any, None] = {}
        """FSDP's groups of parameters that have these weights."""
        self._unused: set[_Gather] = set()

    def forget(self, *args: Any) -> None:
        """Begin a forward pass: the weights may have changed since the last one."""
        self._unused.clear()

    def prepare(self, gather: _Gather, dtype: torch.dtype) -> None:
        """Set the scale of a weight that is gathered now in its layers."""
        if gather not in self._unused:
            self._find(dtype)
        self._unused.remove(gather)

    def _find(self, dtype: torch.dtype) -> None:
        for group in self.groups:
            group.lazy_init()  # of the first gather, before FSDP has seen the model's weights
        shards = [gather.own._sharded_param_data for gather in self.gathers]
        # The largest of the numbers that are rounded to `dtype` is the largest number, rounded.
        largest = torch.stack(torch._foreach_norm(shards, math.inf)).to(dtype).float()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._ranks)
        found = power_of_two_scale(largest, E4M3).view(-1, 1, 1).unbind()
        scales = tuple(gather.scale for gather in self.gathers)
        # Between a forward and its backward pass, which has kept them, they do not change.
        with torch.autograd._unsafe_preserve_version_counter(scales):
            torch._foreach_copy_(scales, found)
        self._unused = set(self.gathers)


class _Gather:
    """What FSDP does to a weight before and after it gathers it.

    Args:
        own: FSDP's record of the weight, an `FSDPParam`.
        layers: which have the weight.
        scales: finds its scale.
    """

    def __init__(self, own: Any, layers: list[Any], scales: _Scales) -> None:
        self.own, self._layers, self._scales = own, layers, scales
        self._init_extensions = own._init_extensions
        own._init_extensions = self._begin

    def _begin(self) -> None:
        """Called once by FSDP, when no other tensor can take the place of the shard any more."""
        self.scale = torch.ones(1, 1, device=self.own.device)
        for layer in self._layers:
            layer.weight_scale = self.scale
        shard = self.own._sharded_local_tensor
        shard.fsdp_pre_all_gather, shard.fsdp_post_all_gather = self._before, self._after
        self._init_extensions()

    def _before(
        self, mesh: Any, size: Any, stride: Any, module: nn.Module, policy: Any
    ) -> tuple[tuple[torch.Tensor], None]:
        """Return what to gather."""
        own = self.own
        dtype = policy.param_dtype or own.orig_dtype
        self._scales.prepare(self, dtype)
        shard = own._sharded_param_data.view(own.padded_sharded_param_size).to(dtype)
        return (quantize(shard, E4M3, "tensor", self.scale).data.view(torch.uint8),), None

    def _after(
        self,
        gathered: tuple[torch.Tensor],
        metadata: None,
        dtype: torch.dtype,
        *,
        out: torch.Tensor | None = None,
    ) -> tuple[Float8Weight, tuple[()]] | None:
        if out is not None:  # made after an earlier gather, of the same memory
            return None
        return Float8Weight(gathered[0].view(E4M3), dtype), ()
