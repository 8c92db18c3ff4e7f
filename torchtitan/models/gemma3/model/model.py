"""Gemma 3 ("Gemma 3 Technical Report", arXiv:2503.19786), the text model.

A decoder-only transformer like Llama 3 (`models/llama3/model/model.py`). Differences:

* five layers of six attend in a sliding window (arXiv:2004.05150), the sixth to everything, and the
  two kinds use different rotary frequencies;
* norms before and after each sublayer, with 1 added to their weight; queries and keys are
  normalised too, per head, before they are rotated;
* scores are divided by the square root of a separate number, in most models the size of a head;
* the gate of the feed-forward layer is a GELU (GeGLU, arXiv:2002.05202);
* embeddings are multiplied by sqrt(dim), and the output layer shares their weight.

Unlike in Gemma 2, logits and scores are not softly capped.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from torchtitan.models.common.attention import AttentionMask, CausalMask, ScaledDotProductAttention
from torchtitan.models.common.decoder import INIT_STD, Decoder
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.models.common.rope import Rotation
from torchtitan.models.common.scaled_rope import LinearScaling, scaled_rotation

from .args import Gemma3ModelArgs


class ZeroCenteredRMSNorm(nn.RMSNorm):
    """x / rms(x) * (1 + weight), in float32 (arXiv:2403.08295).

    The weight starts at 0, where bfloat16 resolves small changes better than near 1.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., dim]` -> `[..., dim]`, of the same dtype."""
        weight = 1 + self.weight.float()
        return F.rms_norm(x.float(), weight.shape, weight, self.eps).type_as(x)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys, and rotary positions."""

    def __init__(self, args: Gemma3ModelArgs) -> None:
        super().__init__()
        self.head_dim = args.head_dim
        q_dim, kv_dim = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
        self.wq = nn.Linear(args.dim, q_dim, bias=False)
        self.wk = nn.Linear(args.dim, kv_dim, bias=False)
        self.wv = nn.Linear(args.dim, kv_dim, bias=False)
        self.wo = nn.Linear(q_dim, args.dim, bias=False)
        self.q_norm = ZeroCenteredRMSNorm(args.head_dim, eps=args.norm_eps)
        self.k_norm = ZeroCenteredRMSNorm(args.head_dim, eps=args.norm_eps)
        self.inner_attention = ScaledDotProductAttention(scale=args.query_pre_attn_scalar**-0.5)

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

    def init_weights(self, std: float) -> None:
        for linear in (self.wq, self.wk, self.wv, self.wo):
            nn.init.normal_(linear.weight, std=std)
        self.q_norm.reset_parameters()
        self.k_norm.reset_parameters()


class TransformerBlock(nn.Module):
    """Attention, then feed-forward; each between two norms, and added to the residual stream."""

    def __init__(self, layer_id: int, args: Gemma3ModelArgs) -> None:
        super().__init__()
        self.attention = Attention(args)
        gelu = partial(F.gelu, approximate="tanh")
        self.feed_forward = FeedForward(args.dim, args.ffn_dim, activation=gelu)
        self.attention_norm = ZeroCenteredRMSNorm(args.dim, eps=args.norm_eps)
        self.attention_post_norm = ZeroCenteredRMSNorm(args.dim, eps=args.norm_eps)
        self.ffn_norm = ZeroCenteredRMSNorm(args.dim, eps=args.norm_eps)
        self.ffn_post_norm = ZeroCenteredRMSNorm(args.dim, eps=args.norm_eps)

    def forward(self, x: torch.Tensor, rotate: Rotation, mask: AttentionMask) -> torch.Tensor:
        """`[batch, seq, dim]` -> `[batch, seq, dim]`."""
        x = x + self.attention_post_norm(self.attention(self.attention_norm(x), rotate, mask))
        return x + self.ffn_post_norm(self.feed_forward(self.ffn_norm(x)))

    def init_weights(self) -> None:
        # Outputs are normalised before they are added to the residual: no need to shrink by depth.
        self.attention.init_weights(INIT_STD)
        self.feed_forward.init_weights(INIT_STD, INIT_STD)
        for norm in (
            self.attention_norm,
            self.attention_post_norm,
            self.ffn_norm,
            self.ffn_post_norm,
        ):
            norm.reset_parameters()


class Gemma3Model(Decoder):
    """The language model."""

    def __init__(self, args: Gemma3ModelArgs) -> None:
        super().__init__(args, TransformerBlock)
        self.norm = ZeroCenteredRMSNorm(args.dim, eps=args.norm_eps)
        self.window_mask = CausalMask(args.attention, window=args.sliding_window)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        h = self.tok_embeddings(tokens)
        # Rounded to the dtype of the weights, as when the published ones were trained.
        return h * torch.full((), self.args.dim**0.5, dtype=h.dtype, device=h.device)

    def attention_inputs(
        self, positions: torch.Tensor, document_ids: torch.Tensor | None
    ) -> dict[str, tuple[Rotation, AttentionMask]]:
        args, shape = self.args, (positions.shape[1], document_ids, positions.device)
        slowed = LinearScaling(args.rope_factor)
        rotate_in_window = scaled_rotation(positions, args.head_dim, args.window_rope_theta, None)
        rotate = scaled_rotation(positions, args.head_dim, args.rope_theta, slowed)
        window, full = (rotate_in_window, self.window_mask(*shape)), (rotate, self.mask(*shape))
        return {name: window if args.has_window(int(name)) else full for name in self.layers}
