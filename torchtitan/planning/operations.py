"""Records the work of a device: each operation's FLOPs and the bytes that it moves."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper

from torchtitan.distributed.ring_attention import sees_rings
from torchtitan.tools.logging import logger

from .cuda_attention import computed_share
from .recorder import Recorder


@dataclass(frozen=True)
class Operation:
    """One kind of call, with one set of shapes."""

    name: str
    flops: int
    """FLOPs of matrix products; 0 for other operations."""
    moved: int
    """Bytes read and written."""
    float32: bool = False
    """Whether it is a matrix product of numbers in float32."""


@sees_rings
class OperationRecorder(Recorder):
    """Counts every operation on local tensors in `operations`, while it is entered.

    Views cost nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[Operation] = Counter()

    def record(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        if func.namespace in _OF_PYTORCH or _is_free(func):
            return
        operands = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        results = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        moved = sum(map(_bytes, (*operands, *results)))
        flops = _flops(func, args, kwargs, result)
        dtypes = {t.dtype for t in operands if t.is_floating_point()}
        float32 = flops > 0 and dtypes == {torch.float32}
        name = func.overloadpacket._qualified_op_name
        if func.namespace != "aten" and func.overloadpacket not in flop_registry:
            _warn_of_unknown_flops(name)
        self.operations[Operation(name, flops, moved, float32)] += 1


_OF_PYTORCH = ("prim", "profiler", "fsdp", "c10d", "_c10d_functional", "_c10d_functional_autograd")
"""Namespaces of operations that compute nothing, or are counted as collectives. Other libraries'
operations are an author's kernels."""

_FREE = (
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "new_empty_strided",
    "detach",
    "_unsafe_view",  # a view, though its schema does not say so
)


FLOAT8_PRODUCTS = ("_scaled_mm", "_scaled_grouped_mm", "_scaled_mm_v2", "_scaled_grouped_mm_v2")

ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
)


@functools.cache
def _warn_of_unknown_flops(name: str) -> None:
    logger.warning(
        "%s has no formula of its FLOPs, so its time is planned by the bytes that it reads and "
        "writes. If it has matrix products, give it one by "
        "torch.utils.flop_counter.register_flop_formula",
        name,
    )


def _bytes(tensor: torch.Tensor) -> int:
    """Return a tensor's bytes; an expanded tensor has fewer bytes than its elements suggest."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def _is_free(func: Any) -> bool:
    """Whether an operation is a view, or allocates memory without writing to it."""
    returns = func._schema.returns
    alias = returns[0].alias_info if returns else None
    is_view = alias is not None and not alias.is_write
    return is_view or func.overloadpacket.__name__ in _FREE


def _flops(func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> int:
    name = func.overloadpacket.__name__
    if name in ATTENTION:
        return _attention_flops(func, args, kwargs)
    if name.removesuffix("_backward") in ATTENTION:
        return _attention_flops(func, args, kwargs) * 5 // 2
    packet = func.overloadpacket
    if func.namespace == "aten":
        packet = getattr(torch.ops.aten, name.removesuffix("_"), packet)  # of an in-place one
    own = FORMULAS.get(packet)
    formula = shape_wrapper(own) if own else flop_registry.get(packet)
    return int(formula(*args, **kwargs, out_val=result)) if formula else 0


def _product_flops(a: list[int], b: list[int], *args: Any, **kwargs: Any) -> int:
    """Return the FLOPs of a product of these shapes, or of groups, each with its own matrix."""
    batches = a[0] if len(a) == len(b) == 3 else 1
    return 2 * batches * a[-2] * a[-1] * b[-1]


def _convolution_backward_flops(
    out: list[int], x: list[int], weight: list[int], *args: Any, **kwargs: Any
) -> int:
    """Count the forward FLOPs for each gradient. PyTorch's formula ignores groups."""
    *_, transposed, _, _, wanted = args  # output_padding, groups; which of x, weight, bias get one
    places = (x if transposed else out)[2:]
    return 2 * x[0] * math.prod(places) * math.prod(weight) * sum(wanted[:2])


def _foreach_product_flops(a: list[list[int]], b: list[list[int]], **kwargs: Any) -> int:
    return sum(map(_product_flops, a, b))


FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._grouped_mm: _product_flops,
    torch.ops.aten._int_mm: _product_flops,
    **{getattr(torch.ops.aten, name): _product_flops for name in FLOAT8_PRODUCTS},
    torch.ops.aten.convolution_backward: _convolution_backward_flops,
}
"""Operation -> its FLOPs by shapes, where PyTorch counts wrongly or not at all."""
if hasattr(torch.ops.aten, "_foreach_mm"):  # since 2.13
    FORMULAS[torch.ops.aten._foreach_mm] = _foreach_product_flops


def _attention_flops(func: Any, args: Any, kwargs: dict[str, Any]) -> int:
    """Return the FLOPs of the two products of a forward pass, without pairs that kernels skip."""
    names = (argument.name for argument in func._schema.arguments)
    named = dict(zip(names, args, strict=False)) | kwargs
    batch, heads, seq, head_dim = named["query"].shape
    mask = named.get("attn_mask", named.get("attn_bias"))
    share = computed_share(mask, named.get("is_causal", False))
    features = head_dim + named["value"].shape[-1]
    return round(share * 2 * batch * heads * seq * named["key"].shape[2] * features)
