"""Causal attention, optionally within documents, windows or chunks, by PyTorch's fused kernels.

A model builds the mask once per forward pass, with a `CausalMask`, and passes it to all blocks,
which attend with a `ScaledDotProductAttention`. Both are modules without parameters, so that
context parallelism can replace them. The type of the mask chooses the kernel:

* None: plain causal; scaled dot product attention (SDPA) skips the upper triangle (flash kernel);
* a boolean tensor, true where a query may look: SDPA with a mask, `seq * seq` bytes per sequence;
* a `BlockMask`: flex attention, which skips blocks that are fully masked (CUDA).
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

Rule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Whether a query may look at a key: (batch, head, query, key) -> boolean, on index tensors that
broadcast. The `mask_mod` of flex attention."""


class ScaledDotProductAttention(nn.Module):
    """softmax(scale * q k^T) v.

    A module without parameters, so that parallelism can wrap it: it sees the heads of its rank.

    Args:
        scale: None: 1 / sqrt(head_dim).
        causal: what no mask means; False: each query sees all keys.
    """

    def __init__(self, scale: float | None = None, causal: bool = True) -> None:
        super().__init__()
        self.scale = scale
        self.causal = causal

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: AttentionMask = None
    ) -> torch.Tensor:
        """Attend.

        Args:
            q: `[batch, heads, seq, head_dim]`.
            k: `[batch, kv_heads, seq, head_dim]`; each serves `heads / kv_heads` query heads.
            v: like `k`.
            mask: from `CausalMask`. None: causal, and if there are more keys, queries are the last;
                or all keys, see `causal`.

        Returns:
            `[batch, heads, seq, head_dim]`.
        """
        is_causal = mask is None and self.causal
        if q.shape[2] == 1:  # the last token sees all keys; a branch makes no compiled SymBool
            is_causal = False
        if is_causal and q.shape[2] != k.shape[2]:
            if q.device.type == "cuda" and fits_flash_kernel(q, v):
                return flash_of_last(q, k, v, self.scale)
            mask, is_causal = mask_of_last(q, k, v), False
        if isinstance(mask, BlockMask):
            return flex(q, k, v, mask, self.scale)
        return sdpa(q, k, v, mask, is_causal, self.scale)


def sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """PyTorch's scaled dot product attention, for the arguments of `ScaledDotProductAttention`.

    With neither `mask` nor `is_causal`, each query sees all keys.

    Args:
        q: `[batch, heads, queries, head_dim]`.
        k: `[batch, kv_heads, keys, head_dim]`.
        v: `[batch, kv_heads, keys, value_dim]`.
        mask: True where a query sees a key, `[queries, keys]` bool or expandable to it.

    Returns:
        `[batch, heads, queries, value_dim]`.
    """
    grouped = q.shape[1] != k.shape[1]
    if grouped and not _knows_grouped_heads(q, mask):
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        grouped = False
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
    )


def _knows_grouped_heads(q: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Return whether SDPA's kernel for such queries supports grouped heads.

    CUDA's memory-efficient kernel does not, but is the only one that takes masks or float32, except
    the one that materializes all scores.
    """
    if q.device.type in ("cpu", "meta"):
        return True
    casts = torch.is_autocast_enabled(q.device.type)  # to half precision, within SDPA
    return mask is None and (casts or q.dtype != torch.float32)


def flash_of_last(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """Attend causally by CUDA's flash kernel, with queries that are the last of the keys' tokens.

    The kernel aligns its triangle with the last key, SDPA with the first. Shapes: see `sdpa`.
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    size = v.shape[-1]
    if size == q.shape[-1]:
        return flash(q, k, v, 0.0, True, scale=scale)[0]
    v = F.pad(v, (0, q.shape[-1] - size))  # the kernel supports one head size: pad with zeros
    return flash(q, k, v, 0.0, True, scale=scale)[0].narrow(-1, 0, size)


def fits_flash_kernel(q: torch.Tensor, v: torch.Tensor) -> bool:
    """Return whether CUDA's flash kernel takes such queries, and values padded to their size."""
    half = q.dtype in (torch.bfloat16, torch.float16)
    size = q.shape[-1]
    return half and v.shape[-1] <= size and size % 8 == 0 and size <= 256


def mask_of_last(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> AttentionMask:
    """Return the causal mask of queries that are the keys' last tokens, if no flash kernel fits."""
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    return mask.tril(k.shape[2] - q.shape[2])


class CausalMask(nn.Module):
    """Builds the mask of a causal model: a query sees its own and earlier keys of its document.

    Args:
        kernel: `model.attention`. `auto`: SDPA if the mask is plain causal, else flex attention on
            CUDA. CPU always uses SDPA, because flex attention has no backward pass there.
        window: number of keys that a query sees, the last being its own (sliding window); None:
            all.
        chunk: tokens in a chunk, counted from the beginning of each document; a query sees only
            keys of its own chunk. None: one chunk.
    """

    def __init__(
        self, kernel: AttentionKernel = "auto", window: int | None = None, chunk: int | None = None
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self.window = window
        self.chunk = chunk

    def forward(
        self,
        seq_len: int,
        document_ids: torch.Tensor | None,
        device: torch.device,
        queries: torch.Tensor | None = None,
    ) -> AttentionMask:
        """Return the mask of one batch.

        Args:
            seq_len: tokens in a sequence. With `document_ids` it may be less, as counted from the
                hidden states of a later pipeline stage, of which tensor parallelism leaves a part.
            document_ids: `[batch, seq]` int64; tokens attend only within their document. None: the
                sequence is one document.
            queries: `[n]` int64, places in the sequence of the queries; None: all, in order.

        Returns:
            The mask of `n` queries and `seq` keys, for all heads. None: plain causal.
        """
        if document_ids is not None:
            seq_len = document_ids.shape[1]
        plain = self.is_plain(seq_len, document_ids)
        use_flex = self.uses_flex(plain, device)
        if plain and not use_flex:
            return None
        return self.build(use_flex, seq_len, document_ids, device, queries)

    def build(
        self,
        use_flex: bool,
        seq_len: int,
        document_ids: torch.Tensor | None,
        device: torch.device,
        queries: torch.Tensor | None,
    ) -> AttentionMask:
        """Return the mask for flex attention or else SDPA; other arguments as in `forward`."""
        batch = 1 if document_ids is None else document_ids.shape[0]
        n = seq_len if queries is None else queries.shape[0]
        build = flex_mask if use_flex else dense_mask
        return build(self.rule(document_ids, queries), batch, n, seq_len, device)

    def uses_flex(self, plain: bool, device: torch.device) -> bool:
        """Return whether to use flex attention for a mask that is, or is not, `plain` causal."""
        return device.type == "cuda" and (
            self.kernel == "flex" or (self.kernel == "auto" and not plain)
        )

    def is_plain(self, seq_len: int, document_ids: torch.Tensor | None) -> bool:
        """Return whether the mask is plain causal, for the same arguments as `forward`."""
        limits = [limit for limit in (self.window, self.chunk) if limit is not None]
        return document_ids is None and all(limit >= seq_len for limit in limits)

    def rule(self, document_ids: torch.Tensor | None, queries: torch.Tensor | None) -> Rule:
        """Return the mask's rule, for the same arguments as `forward`."""
        window, chunk = self.window, self.chunk
        places = None if document_ids is None else places_in_documents(document_ids)

        def may_look(
            batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
        ) -> torch.Tensor:
            if queries is not None:
                query = queries[query]
            allowed = query >= key
            if window is not None:
                allowed = allowed & (query - key < window)
            if document_ids is not None:
                allowed = allowed & (document_ids[batch, query] == document_ids[batch, key])
            if chunk is not None:
                if places is not None:
                    query, key = places[batch, query], places[batch, key]
                allowed = allowed & (query // chunk == key // chunk)
            return allowed

        return may_look


def places_in_documents(document_ids: torch.Tensor) -> torch.Tensor:
    """Count the tokens of its document before each token; both `[batch, seq]` int64."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device)
    begins = document_ids != document_ids.roll(1, dims=1)  # at 0, either gives the index 0
    return index - torch.where(begins, index, 0).cummax(dim=1).values


def dense_mask(
    rule: Rule, batch: int, queries: int, keys: int, device: torch.device
) -> torch.Tensor:
    """Return a boolean mask `[batch, 1, queries, keys]`, true where a query may look."""
    batch_index, query, key = (torch.arange(n, device=device) for n in (batch, queries, keys))
    batch_index, query = batch_index[:, None, None, None], query[:, None]
    allowed = rule(batch_index, torch.zeros_like(batch_index), query, key)
    return allowed.expand(batch, 1, queries, keys)


def flex_mask(rule: Rule, batch: int, queries: int, keys: int, device: torch.device) -> BlockMask:
    """Return the same mask as a block mask for flex attention."""
    create = _fused(create_block_mask, device)
    return create(rule, batch, None, queries, keys, device=device)


def flex(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    scale: float | None,
    **options: Any,
) -> Any:
    """Attend by `flex_attention`, compiled where it needs to be. Shapes: see `sdpa`."""
    attend, grouped = _fused(flex_attention, q.device), q.shape[1] != k.shape[1]
    return attend(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped, **options)


def _fused(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Compile `function` on CUDA, where flex attention would otherwise hold `seq * seq` scores.

    Within a region that is being compiled, the function becomes part of that region.
    """
    if device.type != "cuda" or torch.compiler.is_compiling():
        return function
    return _compiled(function)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)
