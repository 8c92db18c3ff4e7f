"""Causal attention, optionally within documents, by PyTorch's fused kernels.

A model builds the mask once a forward pass, by a `CausalMask`, and hands it to all blocks, which
attend by a `ScaledDotProductAttention`. Both are modules without parameters, so that context
parallelism can take their places. The type of the mask chooses the kernel:

* None: plain causal; scaled dot product attention (SDPA) skips the upper triangle (flash kernel);
* a boolean tensor, true where a query may look: SDPA with a mask, `seq * seq` bytes a sequence;
* a `BlockMask`: flex attention, which skips blocks that are masked throughout (CUDA).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

AttentionKernel = Literal["auto", "sdpa", "flex"]
AttentionMask = torch.Tensor | BlockMask | None


class ScaledDotProductAttention(nn.Module):
    """softmax(q k^T / sqrt(head_dim)) v.

    A module without parameters, so that parallelism can wrap it: it sees the heads of its rank.
    """

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: AttentionMask = None
    ) -> torch.Tensor:
        """Attend.

        Args:
            q: `[batch, heads, seq, head_dim]`.
            k: `[batch, kv_heads, seq, head_dim]`; each serves `heads / kv_heads` query heads.
            v: like `k`.
            mask: from `CausalMask`; None is causal.

        Returns:
            `[batch, heads, seq, head_dim]`.
        """
        grouped = q.shape[1] != k.shape[1]
        if mask is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        if isinstance(mask, BlockMask):
            return _flex_attention(q.device)(q, k, v, block_mask=mask, enable_gqa=grouped)
        if grouped:
            # CUDA's memory-efficient kernel, the one that takes masks, knows no grouped heads.
            repeats = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class CausalMask(nn.Module):
    """Makes the mask of a causal model.

    Args:
        kernel: `model.attention`. `auto` is flex for documents on CUDA, else SDPA. CPU always
            uses SDPA, because flex attention has no backward pass there.
    """

    def __init__(self, kernel: AttentionKernel = "auto") -> None:
        super().__init__()
        self.kernel = kernel

    def forward(
        self, seq_len: int, document_ids: torch.Tensor | None, device: torch.device
    ) -> AttentionMask:
        """The mask of one batch.

        Args:
            seq_len: tokens in a sequence.
            document_ids: `[batch, seq]` int64; tokens attend only within their document. None: the
                sequence is one document.
        """
        if self.uses_flex(document_ids, device):
            return flex_mask(seq_len, document_ids, device)
        if document_ids is None:
            return None
        return sdpa_mask(document_ids)

    def uses_flex(self, document_ids: torch.Tensor | None, device: torch.device) -> bool:
        wanted = self.kernel == "flex" or (self.kernel == "auto" and document_ids is not None)
        return wanted and device.type == "cuda"


def sdpa_mask(document_ids: torch.Tensor) -> torch.Tensor:
    """Causal within documents: boolean `[batch, 1, seq, seq]`, true where a query may look."""
    seq_len = document_ids.shape[1]
    earlier = torch.ones(seq_len, seq_len, dtype=torch.bool, device=document_ids.device).tril()
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    return same & earlier


def flex_mask(seq_len: int, document_ids: torch.Tensor | None, device: torch.device) -> BlockMask:
    """`sdpa_mask`, or the plain causal mask, as a block mask for flex attention."""

    def earlier(
        batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        return query >= key

    def earlier_in_document(
        batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        same = document_ids[batch, query] == document_ids[batch, key]
        return (query >= key) & same

    create = _fused(create_block_mask, device)
    if document_ids is None:
        return create(earlier, None, None, seq_len, seq_len, device=device)
    batch_size = document_ids.shape[0]
    return create(earlier_in_document, batch_size, None, seq_len, seq_len, device=device)


def _flex_attention(device: torch.device) -> Callable[..., torch.Tensor]:
    return _fused(flex_attention, device)


def _fused(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """`function` compiled on CUDA, where flex attention would else hold `seq * seq` scores.

    Within a region that is being compiled, the function becomes part of that region.
    """
    if device.type != "cuda" or torch.compiler.is_compiling():
        return function
    return _compiled(function)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)
