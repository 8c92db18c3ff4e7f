"""Models attention as on CUDA, while a step is traced on the CPU's code paths.

Flash kernels and flex attention skip masked pairs, and hold no mask of `queries * keys` bytes. Here
a `PlannedMask` replaces the mask: it holds the share of the pairs that is computed. The share goes
from the place where a mask is built to the place where its use is counted:

1. `_build` and `_mask_of_last` make a `PlannedMask` in place of a mask.
2. `_attend`, in place of `flex_attention`, gives SDPA the mask's stand-in, whose storage size
   encodes the share.
3. `OperationRecorder` sees SDPA, and reads the size by `computed_share`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.attention.flex_attention import AuxOutput, BlockMask

from torchtitan.models.common import attention

_UNITS = 2**16
"""Bytes of the stand-in of a mask that allows every pair."""
_sdpa_of_cpu = attention.sdpa
_dense_mask = attention.CausalMask.build
_dense_mask_of_last = attention.mask_of_last


class PlannedMask(BlockMask):
    """A mask of which only the share of allowed pairs is known."""

    def __init__(self, share: float) -> None:
        self.share = share
        self._stand_ins: dict[torch.dtype, torch.Tensor] = {}

    def stand_in(self, dtype: torch.dtype) -> torch.Tensor:
        """Return `[1, 1, 1, 1]`, for SDPA to take as a mask. Its storage size encodes the share."""
        if torch.compiler.is_compiling():  # no recorder is active, and nothing may be cached
            return torch.empty(1, 1, 1, 1, dtype=dtype)
        if dtype not in self._stand_ins:
            length = max(1, round(self.share * _UNITS) // dtype.itemsize)
            self._stand_ins[dtype] = torch.empty(length, dtype=dtype)[:1].view(1, 1, 1, 1)
        return self._stand_ins[dtype]


def computed_share(mask: torch.Tensor | None, is_causal: bool) -> float:
    """Return the share of pairs of queries and keys that a call of SDPA computes.

    Args:
        mask: as passed to the kernel; only a stand-in makes it skip pairs.
    """
    if mask is not None and mask.stride()[-2:] == (0, 0):
        return mask.untyped_storage().nbytes() / _UNITS
    return 0.5 if is_causal else 1.0


@contextmanager
def attention_of_cuda() -> Iterator[None]:
    """Make the model's attention take and build `PlannedMask`s, within the context."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(attention.CausalMask, "build", _build))
        stack.enter_context(patch.object(attention, "flex_attention", _attend))
        stack.enter_context(patch.object(attention, "mask_of_last", _mask_of_last))
        stack.enter_context(patch.object(attention, "sdpa", _sdpa))
        yield


def _sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """Replace `sdpa` for heads whose values differ in size from the queries (DeepSeek).

    For these the CPU has no fused kernel, so SDPA would hold all scores. CUDA has one.
    """
    if q.shape[-1] == v.shape[-1] or q.shape[1] != k.shape[1]:
        return _sdpa_of_cpu(q, k, v, mask, is_causal, scale)
    if torch.is_autocast_enabled("cpu"):  # cast as SDPA does
        q, k, v = (x.to(torch.get_autocast_dtype("cpu")) for x in (q, k, v))
    if mask is not None and mask.dtype == torch.bool:  # SDPA turns it into an additive mask
        mask = torch.zeros_like(mask, dtype=q.dtype)
    fused = torch.ops.aten._scaled_dot_product_efficient_attention
    return fused(q, k, v, mask, torch.is_grad_enabled(), 0.0, is_causal, scale=scale)[0]


def _build(
    causal: attention.CausalMask,
    use_flex: bool,
    seq_len: int,
    document_ids: torch.Tensor | None,
    device: torch.device,
    queries: torch.Tensor | None,
) -> attention.AttentionMask:
    """Replace `CausalMask.build` for a mask that is not plain causal."""
    if not causal.uses_flex(False, torch.device("cuda")):
        return _dense_mask(causal, use_flex, seq_len, document_ids, device, queries)
    return PlannedMask(_allowed_share(seq_len, causal.window, causal.chunk))


def _allowed_share(seq_len: int, window: int | None, chunk: int | None) -> float:
    """Return the share of all pairs of tokens that attend, if one document fills the sequence.

    Ranks that share a sequence have queries from its early and late parts, so the share also holds
    for each rank.
    """
    chunk = chunk or seq_len
    window = min(window or chunk, chunk)
    whole, rest = divmod(seq_len, chunk)
    pairs = whole * _pairs(chunk, window) + _pairs(rest, window)
    return pairs / seq_len**2


def _pairs(tokens: int, window: int) -> int:
    """Count the pairs of a query and a key that it sees, at most `window` keys per query."""
    first = min(tokens, window)
    return first * (first + 1) // 2 + (tokens - first) * window


def _mask_of_last(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> attention.AttentionMask:
    if not attention.fits_flash_kernel(q, v):
        return _dense_mask_of_last(q, k, v)
    return PlannedMask(1 - q.shape[2] / 2 / k.shape[2])


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    block_mask: PlannedMask,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_aux: object = None,
) -> Any:
    """Replace `flex_attention`."""
    casts = torch.is_autocast_enabled("cpu")
    mask = block_mask.stand_in(torch.get_autocast_dtype("cpu") if casts else q.dtype)
    mask = mask.expand(1, 1, q.shape[2], k.shape[2])
    out = _sdpa(q, k, v, mask, scale=scale)
    if return_aux is None:
        return out
    return out, AuxOutput(lse=q.new_zeros(q.shape[:3], dtype=torch.float32))
