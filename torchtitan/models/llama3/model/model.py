"""Llama 3 ("The Llama 3 Herd of Models", arXiv:2407.21783).

A decoder-only transformer. Differences from the original one (arXiv:1706.03762):

* RMS norms before each sublayer, without mean or bias (arXiv:1910.07467);
* rotary position embedding on queries and keys, base 500,000, scaled for long contexts since 3.1;
* grouped-query attention: several query heads share a key and value head (arXiv:2305.13245);
* a gated feed-forward layer (SwiGLU), no biases, no dropout;
* in the small models of 3.2, the output layer shares the embedding's weight.
"""

from __future__ import annotations

import torch
import torch.nn as nn

from torchtitan.models.common.attention import AttentionMask, ScaledDotProductAttention
from torchtitan.models.common.decoder import INIT_STD, Decoder, residual_std
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.models.common.rope import Rotation

from .args import Llama3ModelArgs


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, args: Llama3ModelArgs) -> None:
        super().__init__()
        self.head_dim = args.head_dim
        kv_dim = args.n_kv_heads * args.head_dim
        self.wq = nn.Linear(args.dim, args.dim, bias=False)
        self.wk = nn.Linear(args.dim, kv_dim, bias=False)
        self.wv = nn.Linear(args.dim, kv_dim, bias=False)
        self.wo = nn.Linear(args.dim, args.dim, bias=False)
        self.inner_attention = ScaledDotProductAttention()

    def forward(self, x: torch.Tensor, rotate: Rotation, mask: AttentionMask) -> torch.Tensor:
        """`[batch, seq, dim]` -> `[batch, seq, dim]`."""
        batch, seq, _ = x.shape
        # The number of heads is left to view(): under tensor parallel, a rank has its share.
        q = self.wq(x).view(batch, seq, -1, self.head_dim)  # [batch, seq, heads, head_dim]
        k = self.wk(x).view(batch, seq, -1, self.head_dim)  # [batch, seq, kv_heads, head_dim]
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


class TransformerBlock(nn.Module):
    """Attention, then feed-forward; each reads a norm of the residual stream and adds to it."""

    def __init__(self, layer_id: int, args: Llama3ModelArgs) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args.dim, args.ffn_dim)
        self.attention_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.ffn_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)

    def forward(self, x: torch.Tensor, rotate: Rotation, mask: AttentionMask) -> torch.Tensor:
        """`[batch, seq, dim]` -> `[batch, seq, dim]`."""
        x = x + self.attention(self.attention_norm(x), rotate, mask)
        return x + self.feed_forward(self.ffn_norm(x))

    def init_weights(self) -> None:
        output_std = residual_std(self.layer_id)
        self.attention.init_weights(INIT_STD, output_std)
        self.feed_forward.init_weights(INIT_STD, output_std)
        self.attention_norm.reset_parameters()
        self.ffn_norm.reset_parameters()


class Llama3Model(Decoder):
    """The language model."""

    def __init__(self, args: Llama3ModelArgs) -> None:
        super().__init__(args, TransformerBlock)
