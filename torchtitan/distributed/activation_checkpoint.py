"""Activation checkpointing: recompute activations in the backward pass to save memory.

A block's `forward` is replaced by one that checkpoints it. There is no wrapper module, so parameter
names stay as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import torchtitan.distributed.ring_attention  # noqa: F401  (registers an op of SAVED_OPS)
from torchtitan.config import JobConfig
from torchtitan.distributed.blocks import blocks_of

_aten = torch.ops.aten
SAVED_OPS = {
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.torchtitan.ring_attention.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.all_to_all_single.default,
    torch.ops.higher_order.flex_attention,  # seen only within the compiled graph of a block
    _aten.topk.default,
}
"""Ops whose results selective checkpointing per op keeps: costly to compute or to communicate,
cheap to hold. Also `topk`, which chooses experts: the recomputation must choose the same ones."""

MATMUL_OPS = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten._grouped_mm.default,
    _aten._scaled_mm.default,
    _aten._scaled_grouped_mm.default,
}
"""Matrix products; selective checkpointing per op keeps every other one."""


def apply_ac(model: nn.Module, job_config: JobConfig) -> None:
    """Checkpoint the model's blocks (`blocks_of`) in place, by `activation_checkpoint.mode`."""
    config = job_config.activation_checkpoint
    if config.mode == "none":
        return
    if config.mode == "memory_budget":
        # The compiler's partitioner chooses what to recompute.
        torch._functorch.config.activation_memory_budget = config.memory_budget
        _count_grouped_attention()
        return

    every, context_fn = 1, None
    if config.mode == "selective":
        if config.selective_ac_option == "op":
            context_fn = _selective_contexts
        else:
            every = int(config.selective_ac_option)
    for number, layer in enumerate(blocks_of(model).values()):
        if number % every == 0:
            layer.forward = checkpointed(layer, layer.forward, context_fn)


def _count_grouped_attention() -> None:
    """Let the partitioner count the FLOPs of CUDA's attention with fewer heads of keys.

    torch 2.11 raises an AssertionError; later versions count as this does.
    """
    count = flop_counter.sdpa_flop_count
    try:
        count((1, 2, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1))
    except AssertionError:

        def of_query_heads(q: Any, k: Any, v: Any) -> int:
            return count(q, (k[0], q[1], *k[2:]), (v[0], q[1], *v[2:]))

        flop_counter.sdpa_flop_count = of_query_heads


def _selective_contexts() -> Any:
    """Return the contexts of a block's forward pass and recomputation, which must decide alike."""
    matmuls: Counter[bool] = Counter()

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = op in SAVED_OPS
        if op in MATMUL_OPS:
            keep = matmuls[ctx.is_recompute] % 2 == 0
            matmuls[ctx.is_recompute] += 1
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    forward, recomputation = create_selective_checkpoint_contexts(policy)
    return forward, _OnlyKeptOps(recomputation)


class _OnlyKeptOps(TorchDispatchMode):
    """Passes only ops that may have been kept to selective checkpointing's own mode.

    Torch's mode expects the recomputation to run each operation as often as the forward pass did.
    But the FSDP hooks of modules within a block (experts) gather weights only when necessary.
    """

    def __init__(self, inner: TorchDispatchMode) -> None:
        super().__init__()
        self._inner = inner

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in SAVED_OPS or func in MATMUL_OPS:
            return self._inner.__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


def checkpointed(
    layer: nn.Module, forward: Callable[..., Any], context_fn: Callable[[], Any] | None
) -> Any:
    """Return `forward`, that of `layer`, with its activations recomputed in the backward pass.

    Args:
        context_fn: returns the contexts of the forward pass and of the recomputation.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if context_fn is not None:
        options["context_fn"] = context_fn

    buffers = [
        (module, name)
        for module in layer.modules()
        for name, _ in module.named_buffers(recurse=False)
    ]

    # Without the attributes of `forward`: if it is compiled, the compiler would recognize them.
    @wraps(forward, updated=())
    def checkpointed_forward(*args: Any, **kwargs: Any) -> Any:
        # The compiler refuses to recompute attention for which there is no backward pass.
        if not _has_gradients(layer, (*args, *kwargs.values())):
            return forward(*args, **kwargs)
        # The compiler recomputes operations, and repeats none that change a buffer.
        keeps = buffers and not torch.compiler.is_compiling()
        function = _BufferKeeper(buffers, forward) if keeps else forward
        return checkpoint(function, *args, **options, **kwargs)

    made: Any = checkpointed_forward
    made.checkpoint_of, made.context_fn = forward, context_fn
    return checkpointed_forward


def _has_gradients(layer: nn.Module, inputs: Iterable[Any]) -> bool:
    """Return whether there is a backward pass: not in evaluation, nor below all trained layers."""
    if not torch.is_grad_enabled():
        return False
    if any(isinstance(value, torch.Tensor) and value.requires_grad for value in inputs):
        return True
    return any(param.requires_grad for param in layer.parameters())


class _BufferKeeper:
    """One forward pass. Its recomputation begins with the same buffers, and changes none.

    Otherwise running statistics, such as those of BatchNorm, would count each batch twice.
    """

    def __init__(self, buffers: list[tuple[nn.Module, str]], forward: Callable[..., Any]) -> None:
        self._buffers = buffers
        self._forward = forward
        self._changed: list[tuple[nn.Module, str, torch.Tensor]] | None = None
        """Buffers that the forward pass changes, with their values before it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._changed is None:
            present = ((module, name, module._buffers[name]) for module, name in self._buffers)
            before = [
                (module, name, buffer.detach().clone(), buffer, buffer._version)
                for module, name, buffer in present
                if buffer is not None
            ]
            out = self._forward(*args, **kwargs)
            self._changed = [
                (module, name, value)
                for module, name, value, buffer, version in before
                if isinstance(module, _NormBase)  # PyTorch counts no version of these
                or module._buffers[name] is not buffer
                or buffer._version != version
            ]
            return out
        current = [module._buffers[name] for module, name, _ in self._changed]
        for module, name, value in self._changed:
            module._buffers[name] = value.clone()
        try:
            return self._forward(*args, **kwargs)
        finally:
            for (module, name, _), buffer in zip(self._changed, current, strict=True):
                module._buffers[name] = buffer


def is_checkpointed(layer: nn.Module) -> bool:
    return hasattr(layer.forward, "checkpoint_of")


def recomputes_all(layer: nn.Module) -> bool:
    """Return whether the checkpoint of a block keeps no results of its operations."""
    made: Any = layer.forward
    return made.context_fn is None
