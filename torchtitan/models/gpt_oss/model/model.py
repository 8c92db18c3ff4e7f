"""gpt-oss ("gpt-oss-120b & gpt-oss-20b Model Card", arXiv:2508.10925).

A decoder-only transformer like Llama 3 (`models/llama3/model/model.py`). Differences:

* every other layer, from the first on, attends in a sliding window of 128 tokens;
* each head has a sink, a learned logit in the denominator of its softmax (arXiv:2309.17453);
* queries, keys, values and the output of attention have biases, as do experts and their router;
* every feed-forward layer is a mixture of experts, weighted by a softmax over the logits of the
  chosen ones, which equals a softmax over all experts that is normalised over the chosen ones;
* experts bound their features: SwiGLU is clamped at 7, and 1 is added to its linear part;
* rotary positions are stretched by YaRN from the start (arXiv:2309.00071).
"""

from __future__ import annotations

import torch
import torch.nn as nn

from torchtitan.models.common.attention import AttentionMask, CausalMask
from torchtitan.models.common.decoder import INIT_STD, Decoder, residual_std
from torchtitan.models.common.moe import MoE
from torchtitan.models.common.rope import Rotation

from .args import GptOssModelArgs
from .experts import GptOssExperts
from .sink_attention import SinkAttention, Sinks


class Attention(nn.Module):
    """Grouped-query attention with sinks, biases and rotary positions."""

    def __init__(self, args: GptOssModelArgs) -> None:
        super().__init__()
        self.head_dim = args.head_dim
        q_dim, kv_dim = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
        self.wq = nn.Linear(args.dim, q_dim)
        self.wk = nn.Linear(args.dim, kv_dim)
        self.wv = nn.Linear(args.dim, kv_dim)
        self.wo = nn.Linear(q_dim, args.dim)
        self.sinks = Sinks(args.n_heads, args.head_dim)
        self.inner_attention = SinkAttention(args.head_dim)

    def forward(self, x: torch.Tensor, rotate: Rotation, mask: AttentionMask) -> torch.Tensor:
        """`[batch, seq, dim]` -> `[batch, seq, dim]`."""
        batch, seq, _ = x.shape
        # The number of heads is left to view(): under tensor parallel, a rank has its share.
        q = self.wq(x).view(batch, seq, -1, self.head_dim)  # [batch, seq, heads, head_dim]
        k = self.wk(x).view(batch, seq, -1, self.head_dim)  # [batch, seq, kv_heads, head_dim]
        v = self.wv(x).view(batch, seq, -1, self.head_dim)  # [batch, seq, kv_heads, head_dim]
        q, k = self.sinks(rotate(q)), rotate(k)  # [batch, seq, heads, head_dim + 8]
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [batch, heads, seq, _]
        out = self.inner_attention(q, k, v, mask)  # [batch, heads, seq, head_dim]
        out = out.transpose(1, 2).reshape(batch, seq, -1)  # [batch, seq, heads * head_dim]
        return self.wo(out)  # [batch, seq, dim]

    def init_weights(self, std: float, output_std: float) -> None:
        """Draw normal weights; `output_std` is for wo, which writes to the residual stream."""
        for linear in (self.wq, self.wk, self.wv, self.wo):
            nn.init.normal_(linear.weight, std=output_std if linear is self.wo else std)
            nn.init.zeros_(linear.bias)
        self.sinks.reset_parameters()


class TransformerBlock(nn.Module):
    """Attention, then a mixture of experts; each adds to the residual stream."""

    def __init__(self, layer_id: int, args: GptOssModelArgs) -> None:
        super().__init__()
        self.layer_id = layer_id
        moe = args.moe
        experts = GptOssExperts(moe.num_experts, args.dim, moe.hidden_dim, args.swiglu_limit)
        self.attention = Attention(args)
        self.moe = MoE(args.dim, moe, experts)
        self.attention_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.ffn_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)

    def forward(self, x: torch.Tensor, rotate: Rotation, mask: AttentionMask) -> torch.Tensor:
        """`[batch, seq, dim]` -> `[batch, seq, dim]`."""
        x = x + self.attention(self.attention_norm(x), rotate, mask)
        return x + self.moe(self.ffn_norm(x))

    def init_weights(self) -> None:
        output_std = residual_std(self.layer_id)
        self.attention.init_weights(INIT_STD, output_std)
        self.moe.init_weights(INIT_STD, output_std)
        self.attention_norm.reset_parameters()
        self.ffn_norm.reset_parameters()


class GptOssModel(Decoder):
    """The language model."""

    def __init__(self, args: GptOssModelArgs) -> None:
        super().__init__(args, TransformerBlock)
        self.window_mask = CausalMask(args.attention, window=args.sliding_window)

    def attention_inputs(
        self, positions: torch.Tensor, document_ids: torch.Tensor | None
    ) -> dict[str, tuple[Rotation, AttentionMask]]:
        shape = positions.shape[1], document_ids, positions.device
        rotate, full, window = self.rotation(positions), self.mask(*shape), self.window_mask(*shape)
        return {
            name: (rotate, window if self.args.has_window(int(name)) else full)
            for name in self.layers
        }
