"""Llama 4's text model ("The Llama 4 herd", ai.meta.com/blog/llama-4-multimodal-intelligence).

A decoder-only transformer like Llama 3 (`models/llama3/model/model.py`). Differences:

* three layers of four attend within chunks of 8,192 tokens; their rotary pairs are interleaved,
  and queries and keys are then divided by their root mean square, without a weight (Scout);
* every fourth layer attends to everything, and has no positions (NoPE, arXiv:2305.19466); far into
  a text, its queries grow, which sharpens the softmax over many keys (arXiv:2501.19399);
* every layer (Scout) or every other one (Maverick) has a mixture of experts. One routed and one
  shared expert process each token; the sigmoid of the routed one's logit multiplies its input.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from torchtitan.models.common.attention import AttentionMask, CausalMask, ScaledDotProductAttention
from torchtitan.models.common.decoder import INIT_STD, Decoder, residual_std
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.models.common.moe import MoE
from torchtitan.models.common.rope import Rotation
from torchtitan.models.common.scaled_rope import scaled_rotation

from .args import Llama4ModelArgs
from .experts import Llama4Experts


class Temperature:
    """Makes queries of layers without positions grow with the logarithm of their position.

    A plain object, like `Rotation`, so that mixed precision leaves it in float32.

    Args:
        positions: `[batch or 1, seq]`.
        floor: queries grow at multiples of this many tokens.
        scale: amount by which they grow.
    """

    def __init__(self, positions: torch.Tensor, floor: int, scale: float) -> None:
        multiples = torch.floor((positions[..., None, None].float() + 1) / floor)
        self.factor = multiples.log1p() * scale + 1  # [batch or 1, seq, 1, 1]

    def __call__(self, q: torch.Tensor) -> torch.Tensor:
        """Multiply `q` `[batch, seq, heads, head_dim]` in float32, and return it in its dtype."""
        return (q.float() * self.factor).to(q.dtype)


class Attention(nn.Module):
    """Grouped-query attention: within a chunk with positions, or everywhere without positions."""

    def __init__(self, args: Llama4ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.head_dim = args.head_dim
        q_dim, kv_dim = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
        self.wq = nn.Linear(args.dim, q_dim, bias=False)
        self.wk = nn.Linear(args.dim, kv_dim, bias=False)
        self.wv = nn.Linear(args.dim, kv_dim, bias=False)
        self.wo = nn.Linear(q_dim, args.dim, bias=False)
        self.inner_attention = ScaledDotProductAttention()

    def forward(
        self, x: torch.Tensor, place: Rotation | Temperature, mask: AttentionMask
    ) -> torch.Tensor:
        """`[batch, seq, dim]` -> `[batch, seq, dim]`. The type of `place` is the kind of layer."""
        batch, seq, _ = x.shape
        # The number of heads is left to view(): under tensor parallel, a rank has its share.
        q = self.wq(x).view(batch, seq, -1, self.head_dim)  # [batch, seq, heads, head_dim]
        k = self.wk(x).view(batch, seq, -1, self.head_dim)  # [batch, seq, kv_heads, head_dim]
        v = self.wv(x).view(batch, seq, -1, self.head_dim)  # [batch, seq, kv_heads, head_dim]
        if isinstance(place, Temperature):
            q = place(q)
        else:
            q, k = place(q), place(k)
            if self.args.qk_norm:
                q, k = (F.rms_norm(t, (self.head_dim,), eps=self.args.norm_eps) for t in (q, k))
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
    """Attention, then a feed-forward layer (`feed_forward`) or a mixture of experts (`moe`)."""

    def __init__(self, layer_id: int, args: Llama4ModelArgs) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.attention = Attention(args)
        self.feed_forward: FeedForward | None = None
        self.moe: MoE | None = None
        if args.has_experts(layer_id):
            experts = Llama4Experts(args.moe.num_experts, args.dim, args.moe.hidden_dim)
            self.moe = MoE(args.dim, args.moe, experts)
        else:
            self.feed_forward = FeedForward(args.dim, args.ffn_dim)
        self.attention_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.ffn_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)

    def forward(
        self, x: torch.Tensor, place: Rotation | Temperature, mask: AttentionMask
    ) -> torch.Tensor:
        """`[batch, seq, dim]` -> `[batch, seq, dim]`."""
        x = x + self.attention(self.attention_norm(x), place, mask)
        feed_forward: Any = self.feed_forward if self.moe is None else self.moe
        return x + feed_forward(self.ffn_norm(x))

    def init_weights(self) -> None:
        output_std = residual_std(self.layer_id)
        for sublayer in (self.attention, self.feed_forward, self.moe):
            if sublayer is not None:
                sublayer.init_weights(INIT_STD, output_std)
        self.attention_norm.reset_parameters()
        self.ffn_norm.reset_parameters()


class Llama4Model(Decoder):
    """The language model."""

    def __init__(self, args: Llama4ModelArgs) -> None:
        super().__init__(args, TransformerBlock)
        self.chunk_mask = CausalMask(args.attention, chunk=args.chunk)

    def rotation(self, positions: torch.Tensor) -> Rotation:
        head_dim, theta = self.args.head_dim, self.args.rope_theta
        scaling = self.args.rope_scaling
        return scaled_rotation(positions, head_dim, theta, scaling, interleaved=True)

    def attention_inputs(
        self, positions: torch.Tensor, document_ids: torch.Tensor | None
    ) -> Mapping[str, tuple[Rotation | Temperature, AttentionMask]]:
        args, shape = self.args, (positions.shape[1], document_ids, positions.device)
        chunked = self.rotation(positions), self.chunk_mask(*shape)
        temperature = Temperature(positions, args.temperature_floor, args.temperature_scale)
        everywhere = temperature, self.mask(*shape)
        return {
            name: chunked if args.has_positions(int(name)) else everywhere for name in self.layers
        }
