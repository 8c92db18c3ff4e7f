"""Attention sinks: a learned logit per head that takes part in the softmax (arXiv:2309.17453).

The weights of a query add up to less than 1, so that a head can attend to almost nothing:
weight_j = exp(s_j) / (exp(sink) + sum_i exp(s_i)).

The fused kernels do not support sinks. But a sink is equivalent to a first key that has the value 0
and the same score for each query of a head. So each query carries its head's sink in an additional
feature, which is 1 in the first key and 0 in all others. This works with every kernel of SDPA,
gradients included. As the sinks travel with the queries, context parallelism needs no change.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask

from torchtitan.models.common.attention import AttentionMask, ScaledDotProductAttention, flex

SINK_FEATURES = 8
"""One for the sink, the rest zeros: CUDA's kernels need rows of a multiple of 16 bytes in bfloat16.
"""


class Sinks(nn.Module):
    """The sinks of a layer, one per head."""

    def __init__(self, n_heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_heads))
        self.scale = head_dim**-0.5

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        """Queries `[batch, seq, heads, head_dim]` -> `[batch, seq, heads, head_dim + 8]`."""
        sinks = (self.weight / self.scale).to(q.dtype)  # attention multiplies by the scale
        features = F.pad(sinks[:, None], (0, SINK_FEATURES - 1))  # [heads, 8]
        return torch.cat([q, features.expand(*q.shape[:-1], -1)], dim=-1)

    def reset_parameters(self) -> None:
        """Set zeros: as if each query saw one more key, with the score 0 and the value 0."""
        nn.init.zeros_(self.weight)


class SinkAttention(ScaledDotProductAttention):
    """softmax([sink, q k^T / sqrt(head_dim)]) [0, v].

    Args:
        head_dim: of keys and values.
    """

    scale: float

    def __init__(self, head_dim: int) -> None:
        super().__init__(scale=head_dim**-0.5)
        self.head_dim = head_dim

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: AttentionMask = None
    ) -> torch.Tensor:
        """Attend.

        Args:
            q: `[batch, heads, seq, head_dim + 8]`, from `Sinks`.
            k: `[batch, kv_heads, seq, head_dim]`; each serves `heads / kv_heads` query heads.
            v: like `k`.
            mask: from `CausalMask`.

        Returns:
            `[batch, heads, seq, head_dim]`.
        """
        if isinstance(mask, BlockMask):
            return self._rescaled(q, k, v, mask)
        sink_key = F.pad(k.new_ones(1), (self.head_dim, SINK_FEATURES - 1))
        sink_key = sink_key.expand(*k.shape[:2], 1, -1)
        k = torch.cat([sink_key, F.pad(k, (0, SINK_FEATURES))], dim=2)
        v = F.pad(v, (0, SINK_FEATURES, 1, 0))  # the value 0 of the first key
        if mask is not None:
            mask = F.pad(mask, (1, 0), value=True)
        # Without a mask, attention is causal; if there are more keys, the queries are the last.
        return super().forward(q, k, v, mask)[..., : self.head_dim]

    def _rescaled(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask
    ) -> torch.Tensor:
        """Attend by flex attention, and add the sinks to the log denominators that it returns."""
        q, sinks = q[..., : self.head_dim], q[..., self.head_dim] * self.scale
        out, aux = flex(q, k, v, mask, self.scale, return_aux=AuxRequest(lse=True))
        return out * torch.sigmoid(aux.lse - sinks)[..., None].to(out.dtype)
