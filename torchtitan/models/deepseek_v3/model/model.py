"""DeepSeek-V3 ("DeepSeek-V3 Technical Report", arXiv:2412.19437), and V2 (arXiv:2405.04434).

A decoder-only transformer like Llama 3 (`models/llama3/model/model.py`). Differences:

* multi-head latent attention (MLA): keys and values are computed from a small vector per token, the
  latent, which alone would be cached when generating; larger models compute queries alike;
* positions have their own features: each head's key has a part without positions, computed from the
  latent, and a rotated part, which all heads share; values are smaller than keys;
* rotary pairs are interleaved, and stretched by YaRN, which also raises attention scores;
* except in the first layers, each feed-forward layer is a mixture of many small experts, with some
  shared ones. V3 scores experts by sigmoids, chooses within the best groups of experts, and
  balances their load by a bias that only affects the choice; V2 scores by a softmax.

With `mtp_depth`, further blocks are trained to predict the tokens after the next. Only training
uses them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn as nn

from torchtitan.models.common.attention import AttentionMask, ScaledDotProductAttention
from torchtitan.models.common.decoder import INIT_STD, Decoder, residual_std
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.models.common.moe import MoE
from torchtitan.models.common.norm import RMSNorm
from torchtitan.models.common.rope import Rotation
from torchtitan.models.common.scaled_rope import scaled_rotation

from .args import DeepSeekV3ModelArgs

LATENT_NORM_EPS = 1e-6
"""Epsilon of the latents' norms, whatever `norm_eps` is."""


class Attention(nn.Module):
    """Multi-head latent attention."""

    wq: nn.Linear | None
    wq_a: Any  # these three are modules if wq is None, else None
    q_norm: Any
    wq_b: Any

    def __init__(self, args: DeepSeekV3ModelArgs) -> None:
        super().__init__()
        self.args = args
        q_dim = args.n_heads * args.qk_dim
        self.wq = self.wq_a = self.q_norm = self.wq_b = None
        if args.q_rank is None:
            self.wq = nn.Linear(args.dim, q_dim, bias=False)
        else:
            self.wq_a = nn.Linear(args.dim, args.q_rank, bias=False)
            self.q_norm = RMSNorm(args.q_rank, eps=LATENT_NORM_EPS)
            self.wq_b = nn.Linear(args.q_rank, q_dim, bias=False)
        self.wkv_a = nn.Linear(args.dim, args.kv_rank + args.qk_rope_dim, bias=False)
        self.kv_norm = RMSNorm(args.kv_rank, eps=LATENT_NORM_EPS)
        kv_dim = args.n_heads * (args.qk_nope_dim + args.v_dim)
        self.wkv_b = nn.Linear(args.kv_rank, kv_dim, bias=False)
        self.rotary_key = RotaryKey()
        scale = args.yarn.score_factor * args.qk_dim**-0.5 if args.yarn else None
        self.inner_attention = ScaledDotProductAttention(scale)
        self.wo = nn.Linear(args.n_heads * args.v_dim, args.dim, bias=False)

    def forward(self, x: torch.Tensor, rotate: Rotation, mask: AttentionMask) -> torch.Tensor:
        """`[batch, seq, dim]` -> `[batch, seq, dim]`."""
        args = self.args
        # The number of heads is left to unflatten(): under tensor parallel, a rank has its share.
        q = self.wq(x) if self.wq is not None else self.wq_b(self.q_norm(self.wq_a(x)))
        q = q.unflatten(-1, (-1, args.qk_dim))  # [batch, seq, heads, qk_dim]
        q_nope, q_rope = q.split([args.qk_nope_dim, args.qk_rope_dim], dim=-1)
        q = torch.cat([q_nope, rotate(q_rope)], dim=-1)

        latent, k_rope = self.wkv_a(x).split([args.kv_rank, args.qk_rope_dim], dim=-1)
        kv = self.wkv_b(self.kv_norm(latent))  # [batch, seq, heads * (qk_nope_dim + v_dim)]
        kv = kv.unflatten(-1, (-1, args.qk_nope_dim + args.v_dim))
        k_nope, v = kv.split([args.qk_nope_dim, args.v_dim], dim=-1)  # [batch, seq, heads, _]
        k_rope = self.rotary_key(k_rope, rotate)  # [batch, seq, 1, qk_rope_dim]
        k = torch.cat([k_nope, k_rope.expand(-1, -1, k_nope.shape[2], -1)], dim=-1)

        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [batch, heads, seq, _]
        out = self.inner_attention(q, k, v, mask)  # [batch, heads, seq, v_dim]
        return self.wo(out.transpose(1, 2).flatten(start_dim=2))  # [batch, seq, dim]

    def init_weights(self, std: float, output_std: float) -> None:
        """Draw normal weights; `output_std` is for wo, which writes to the residual stream."""
        for linear in (self.wq, self.wq_a, self.wq_b, self.wkv_a, self.wkv_b):
            if linear is not None:
                nn.init.normal_(linear.weight, std=std)
        nn.init.normal_(self.wo.weight, std=output_std)
        for norm in (self.q_norm, self.kv_norm):
            if norm is not None:
                norm.reset_parameters()


class RotaryKey(nn.Module):
    """The part of the keys that has positions, one for all heads.

    A module without parameters, so that tensor parallelism can pass it to all ranks' heads.
    """

    def forward(self, k_rope: torch.Tensor, rotate: Rotation) -> torch.Tensor:
        """`[batch, seq, qk_rope_dim]` -> `[batch, seq, 1, qk_rope_dim]`."""
        return rotate(k_rope.unsqueeze(2))


class TransformerBlock(nn.Module):
    """Attention, then a feed-forward layer (`feed_forward`) or a mixture of experts (`moe`)."""

    def __init__(self, layer_id: int, args: DeepSeekV3ModelArgs) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.attention = Attention(args)
        dense = layer_id < args.n_dense_layers
        self.feed_forward = FeedForward(args.dim, args.ffn_dim) if dense else None
        self.moe = None if dense else MoE(args.dim, args.moe, float32_gate=True)
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


class MTPBlock(TransformerBlock):
    """Predicts one token further than the block before it (section 2.2 of the report)."""

    def __init__(self, layer_id: int, args: DeepSeekV3ModelArgs) -> None:
        super().__init__(layer_id, args)
        self.embedding_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.hidden_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.projection = nn.Linear(2 * args.dim, args.dim, bias=False)
        self.norm = nn.RMSNorm(args.dim, eps=args.norm_eps)

    def forward(  # type: ignore[override]
        self, h: torch.Tensor, embedded: torch.Tensor, rotate: Rotation, mask: AttentionMask
    ) -> torch.Tensor:
        """Return the input of the output layer, `[batch, seq, dim]`.

        Args:
            h: that of one token less, `[batch, seq, dim]`.
            embedded: the token that is predicted from `h`, `[batch, seq, dim]`.
        """
        both = torch.cat([self.embedding_norm(embedded), self.hidden_norm(h)], dim=-1)
        return self.norm(super().forward(self.projection(both), rotate, mask))

    def init_weights(self) -> None:
        super().init_weights()
        nn.init.normal_(self.projection.weight, std=INIT_STD)
        for norm in (self.embedding_norm, self.hidden_norm, self.norm):
            norm.reset_parameters()


class DeepSeekV3Model(Decoder):
    """The language model.

    `mtp` are the blocks that predict tokens after the next. `mtp_embeddings` is `tok_embeddings`,
    under a second name because they may be in another pipeline stage. Both are None without
    `args.mtp_depth`.
    """

    mtp: Any
    mtp_embeddings: Any
    other_blocks = ("mtp",)
    training_blocks = ("mtp", "mtp_embeddings")
    sequence_inputs = ("next_tokens",)

    def __init__(self, args: DeepSeekV3ModelArgs) -> None:
        super().__init__(args, TransformerBlock)
        self.mtp = self.mtp_embeddings = None
        if args.mtp_depth > 0:
            ids = range(args.n_layers, args.n_layers + args.mtp_depth)
            self.mtp = nn.ModuleList(MTPBlock(i, args) for i in ids)
            self.mtp_embeddings = self.tok_embeddings

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        next_tokens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the logits of the next token and, with `next_tokens`, of those after it.

        Args:
            tokens, positions, document_ids: see `Decoder`.
            next_tokens: `[batch, seq, mtp_depth]` int64: the tokens that follow each token.

        Returns:
            As `Decoder`; with `next_tokens`, logits `[batch, seq, 1 + mtp_depth, vocab]`.
        """
        h, inputs = self.hidden_states(tokens, positions, document_ids)
        if self.output is None:
            return h
        if self.mtp is None or next_tokens is None:
            return self.output(h)
        states = [h]
        for block, following in zip(self.mtp, next_tokens.unbind(-1), strict=True):
            states.append(block(states[-1], self.mtp_embeddings(following), *inputs["mtp"]))
        return self.output(torch.stack(states, dim=2))

    def attention_inputs(
        self, positions: torch.Tensor, document_ids: torch.Tensor | None
    ) -> Mapping[str, tuple[Callable[..., Any], AttentionMask]]:
        rotate = self.rotation(positions)
        mask = self.mask(positions.shape[1], document_ids, positions.device)
        return dict.fromkeys([*self.layers, "mtp"], (rotate, mask))

    def init_weights(self) -> None:
        super().init_weights()
        for block in self.mtp or ():
            block.init_weights()

    def rotation(self, positions: torch.Tensor) -> Rotation:
        head_dim, theta = self.args.qk_rope_dim, self.args.rope_theta
        return scaled_rotation(positions, head_dim, theta, self.args.yarn, interleaved=True)
