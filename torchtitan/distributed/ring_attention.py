"""Causal attention whose keys and values travel around a ring (arXiv:2310.01889).

At each step a rank attends to the keys of one rank while it passes them on, so that no rank ever
holds all keys. The partial results are merged by the logarithms of their softmax denominators,
which the flash kernels return. Given the whole denominators, the kernels' backward passes return
exactly this part's share of the gradients (FlashAttention-2, arXiv:2307.08691).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_to_all_single
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan.distributed.sequence_shards import SequenceShards

_aten = torch.ops.aten
M = TypeVar("M", bound=TorchDispatchMode)


def ring_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shards: SequenceShards, group: str
) -> torch.Tensor:
    """Attend causally over sequences that the ranks share in balanced order.

    Args:
        q: `[batch, heads, seq / cp, head_dim]`; on CUDA bfloat16 or float16, for its flash kernel.
        k: `[batch, kv_heads, seq / cp, head_dim]`; each serves `heads / kv_heads` query heads.
        v: like `k`.
        group: name of the ranks' process group.

    Returns:
        Like `q`.
    """
    return _RingAttention.apply(q, k, v, group, shards.rank, shards.size)


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: str, rank: int, size: int
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Compute ring attention; all ranks of a ring call this at once.

    Args:
        group: name of the ring's process group.
        rank: this rank's place in the ring.
        size: number of ranks in the ring.

    Returns:
        Output, log of the softmax denominators `[batch, heads, seq / cp]`, and random state for
        backward.
    """
    kv = torch.stack([k, v])
    for step in range(size):
        # Sent now, waited for at the end of this step.
        coming = _pass_on(kv, group, rank, size) if step + 1 < size else None
        rows, keys = _block(rank, step, q.shape[2])
        block_k, block_v = kv[:, :, :, keys].unbind()
        block, block_lse, block_rng = _flash(q[:, :, rows], block_k, block_v, step == 0)
        if step == 0:
            out, lse, rng = block.float(), block_lse, block_rng
        else:
            _merge(out[:, :, rows], lse[:, :, rows], block, block_lse)
        kv = _wait(coming)
    return torch.empty_like(q).copy_(out), lse, list(rng)


_ring_forward = torch.library.custom_op("torchtitan::ring_attention", _forward, mutates_args=())
"""A single op, so that selective checkpointing keeps the ring's result rather than its blocks."""


@_ring_forward.register_fake
def _shapes(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: str, rank: int, size: int
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    _, lse, rng = _flash(q, k, v, True)
    return torch.empty_like(q), lse, list(rng)


def _backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    rng: list[torch.Tensor],
    group: str,
    rank: int,
    size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of q, k and v, given `grad` of `out` and the results of `_forward`."""
    kv = torch.stack([k, v])
    q_grad = torch.zeros_like(q, dtype=torch.float32)
    kv_grad = torch.zeros_like(kv, dtype=torch.float32)
    for step in range(size):
        coming = _pass_on(kv, group, rank, size) if step + 1 < size else None
        rows, keys = _block(rank, step, q.shape[2])
        queries = [x[:, :, rows].contiguous() for x in (grad, q, out, lse)]
        block_grad, block_q, block_out, block_lse = queries
        block_k, block_v = kv[:, :, :, keys].unbind()
        block_q_grad, *block_kv_grad = _flash_backward(
            block_grad, block_q, block_out, block_lse, block_k, block_v, rng, step == 0
        )
        q_grad[:, :, rows] += block_q_grad
        kv_grad = _wait(kv_grad)
        kv_grad[:, :, :, keys] += torch.stack(block_kv_grad)
        # The gradients travel with their keys, and are home after the last step.
        kv_grad = _pass_on(kv_grad, group, rank, size)
        kv = _wait(coming)
    k_grad, v_grad = _wait(kv_grad).unbind()
    grads = zip((q, k, v), (q_grad, k_grad, v_grad), strict=True)
    q_grad, k_grad, v_grad = (torch.empty_like(x).copy_(x_grad) for x, x_grad in grads)
    return q_grad, k_grad, v_grad


_ring_backward = torch.library.custom_op(
    "torchtitan::ring_attention_backward", _backward, mutates_args=()
)
"""A single op. Otherwise the compiler would send the keys for it in the forward pass, since they
depend on no gradient, and keep those of all ranks until the backward pass."""


@_ring_backward.register_fake
def _gradient_shapes(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def sees_rings(mode: type[M]) -> type[M]:
    """Decorate a class of dispatch modes so that they see the ops inside a ring, not the ring."""
    for operation, inside in ((_ring_forward, _forward), (_ring_backward, _backward)):
        operation.register_torch_dispatch(mode, _looks_at(inside))
    return mode


def _looks_at(inside: Callable[..., Any]) -> Callable[..., Any]:
    def look(mode: Any, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        # The mode is entered already: its class's own actions on entering must not be repeated.
        TorchDispatchMode.__enter__(mode)
        try:
            return inside(*args, **(kwargs or {}))
        finally:
            TorchDispatchMode.__exit__(mode, None, None, None)

    return look


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *ring: Any
    ) -> torch.Tensor:
        out, lse, rng = _ring_forward(q, k, v, *ring)
        ctx.save_for_backward(q, k, v, out, lse, *rng)
        ctx.ring = ring
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse, *rng = ctx.saved_tensors
        grads = _ring_backward(grad, q, k, v, out, lse, rng, *ctx.ring)
        return *grads, None, None, None


def _block(rank: int, step: int, length: int) -> tuple[slice, slice]:
    """Return slices of this rank's queries and the present keys: these queries see all these keys.

    Two chunks are present, an early and a late one. Those of a lower rank are earlier than this
    rank's early chunk and later than its late chunk; those of a higher rank lie between the two.
    """
    whole, early, late = slice(None), slice(length // 2), slice(length // 2, None)
    if step == 0:
        return whole, whole  # this rank's own keys: causal
    if step <= rank:
        return whole, early
    return late, whole


def _pass_on(tensor: torch.Tensor, group: str, rank: int, size: int) -> torch.Tensor:
    """Send to the next rank, receive from the previous one. The result may still be pending."""
    to_next, from_previous = [0] * size, [0] * size
    to_next[(rank + 1) % size] = len(tensor)
    from_previous[(rank - 1) % size] = len(tensor)
    return all_to_all_single(tensor, from_previous, to_next, cast(Any, group))


def _wait(tensor: Any) -> Any:
    return tensor.wait() if isinstance(tensor, AsyncCollectiveTensor) else tensor


def _merge(
    out: torch.Tensor, lse: torch.Tensor, block: torch.Tensor, block_lse: torch.Tensor
) -> None:
    """Add the contribution of further keys to `out` and `lse`, in place."""
    total = torch.logaddexp(lse, block_lse)
    out.mul_((lse - total).exp()[..., None])
    out.add_(block * (block_lse - total).exp()[..., None])
    lse.copy_(total)


def _flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    """Return output, log of the softmax denominators `[batch, heads, seq]`, and random state."""
    if q.device.type == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
        return out, lse, ()
    out, lse, _, _, _, _, seed, offset, _ = _aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, causal
    )
    return out, lse, (seed, offset)


def _flash_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rng: list[torch.Tensor],
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of q, k and v."""
    if q.device.type == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal
        )
    lengths = (None, None, q.shape[2], k.shape[2])
    return _aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse, *lengths, 0.0, causal, *rng
    )
