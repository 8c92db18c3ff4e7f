"""Qwen3 ("Qwen3 Technical Report", arXiv:2505.09388), dense and with mixtures of experts.

A decoder-only transformer like Llama 3 (`models/llama3/model/model.py`). Differences:

* queries and keys are normalised, per head, before they are rotated (arXiv:2302.05442);
* the size of a head is a separate choice: heads times their size need not be `dim`;
* in the models with an A in their name, every feed-forward layer is a mixture of experts, without
  shared experts; expert weights are a softmax over all experts, normalised over the chosen ones;
* rotary base 1,000,000, for long contexts with YaRN (arXiv:2309.00071); in the small models, the
  output layer shares the embedding's weight.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn

from torchtitan.models.common.attention import AttentionMask, ScaledDotProductAttention
from torchtitan.models.common.decoder import INIT_STD, Decoder, residual_std
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.models.common.moe import MoE
from torchtitan.models.common.norm import RMSNorm
from torchtitan.models.common.rope import Rotation

from .args import Qwen3ModelArgs


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys, and rotary positions."""

    def __init__(self, args: Qwen3ModelArgs) -> None:
        super().__init__()
        self.head_dim = args.head_dim
        q_dim, kv_dim = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
        self.wq = nn.Linear(args.dim, q_dim, bias=False)
        self.wk = nn.Linear(args.dim, kv_dim, bias=False)
        self.wv = nn.Linear(args.dim, kv_dim, bias=False)
        self.wo = nn.Linear(q_dim, args.dim, bias=False)
        self.q_norm = RMSNorm(args.head_dim, eps=args.norm_eps)
        self.k_norm = RMSNorm(args.head_dim, eps=args.norm_eps)
        self.inner_attention = ScaledDotProductAttention()

    def forward(self, x: torch.Tensor, rotate: Rotation, mask: AttentionMask) -> torch.Tensor:
        """`[batch, seq, dim]` -> `[batch, seq, dim]`."""
        batch, seq, _ = x.shape
        # The number of heads is left to view(): under tensor parallel, a rank has its share.
        q = self.q_norm(self.wq(x).view(batch, seq, -1, self.head_dim))  # [batch, seq, heads, _]
        k = self.k_norm(self.wk(x).view(batch, seq, -1, self.head_dim))  # [batch, seq, kv_heads, _]
        v = self.wv(x).view(batch, seq, -1, self.head_dim)  # [batch, seq, kv_heads, head_dim]
        q, k = rotate(q), rotate(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [batch, heads, seq, _]
        out = self.inner_attention(q, k, v, mask)  # [batch, heads, seq, head_dim]
        out = out.transpose(1, 2).reshape(batch, seq, -1)  # [batch, seq, heads * head_dim]
        return self.wo(out)  # [batch, seq, dim]

    def init_weights(self, std: float, output_std: float) -> None:
        """Draw normal weights; `output_std` is for wo, which writes to the residual stream."""
        for linear in (self.wq, self.wk, self.wv):
            nn.init.normal_(linear.weight, std=std)
        nn.init.normal_(self.wo.weight, std=output_std)
        self.q_norm.reset_parameters()
        self.k_norm.reset_parameters()


class TransformerBlock(nn.Module):
    """Attention, then a feed-forward layer (`feed_forward`) or a mixture of experts (`moe`)."""

    def __init__(self, layer_id: int, args: Qwen3ModelArgs) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args.dim, args.ffn_dim) if args.moe is None else None
        self.moe = MoE(args.dim, args.moe) if args.moe is not None else None
        self.attention_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.ffn_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)

    def forward(self, x: torch.Tensor, rotate: Rotation, mask: AttentionMask) -> torch.Tensor:
        """`[batch, seq, dim]` -> `[batch, seq, dim]`."""
        x = x + self.attention(self.attention_norm(x), rotate, mask)
        feed_forward: Any = self.feed_forward if self.moe is None else self.moe
        return x + feed_forward(self.ffn_norm(x))

    def init_weights(self) -> None:
        output_std = residual_std(self.layer_id)
        for sublayer in (self.attention, self.feed_forward, self.moe):
            if sublayer is not None:
                sublayer.init_weights(INIT_STD, output_std)
        self.attention_norm.reset_parameters()
        self.ffn_norm.reset_parameters()


class Qwen3Model(Decoder):
    """The language model."""

    def __init__(self, args: Qwen3ModelArgs) -> None:
        super().__init__(args, TransformerBlock)
