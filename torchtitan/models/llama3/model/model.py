"""Llama 3 ("The Llama 3 Herd of Models", arXiv:2407.21783).

A decoder-only transformer. What departs from the original one (arXiv:1706.03762):

* norms before each sublayer, by root mean square, without mean or bias (arXiv:1910.07467);
* rotary position embedding on queries and keys, base 500,000, scaled for long contexts since 3.1;
* grouped-query attention: several query heads share a key and value head (arXiv:2305.13245);
* a gated feed-forward layer (SwiGLU), no biases, no dropout;
* the small models of 3.2 use the embedding's weight as the output layer's.
"""

from __future__ import annotations

from typing import Self

import torch
import torch.nn as nn

from torchtitan.models.common.attention import (
    AttentionMask,
    CausalMask,
    ScaledDotProductAttention,
)
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.models.common.rope import Rotation, rope_frequencies, rotation
from torchtitan.protocols.model import ModelProtocol

from .args import Llama3ModelArgs
from .state_dict_adapter import Llama3StateDictAdapter

INIT_STD = 0.02


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
        """Normal weights; `output_std` is for wo, which writes to the residual stream."""
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
        # 2 (layer_id + 1) sublayers have written to the stream by now; their sum stays level.
        output_std = INIT_STD / (2 * (self.layer_id + 1)) ** 0.5
        self.attention.init_weights(INIT_STD, output_std)
        self.feed_forward.init_weights(INIT_STD, output_std)
        self.attention_norm.reset_parameters()
        self.ffn_norm.reset_parameters()


class Llama3Model(ModelProtocol):
    """The language model. In a pipeline stage, layers may be deleted and other parts be None."""

    state_dict_adapter_cls = Llama3StateDictAdapter

    def __init__(self, args: Llama3ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleDict(
            {str(i): TransformerBlock(i, args) for i in range(args.n_layers)}
        )
        self.norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        self.mask = CausalMask(args.attention)
        self._tie_weights()

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits of the next token.

        Args:
            tokens: `[batch, seq]` int64; hidden states `[batch, seq, dim]` without an embedding.
            positions: `[batch, seq]` or `[1, seq]` int64; None counts from 0.
            document_ids: `[batch, seq]` int64; tokens attend only within their document. None: the
                sequence is one document.

        Returns:
            `[batch, seq, vocab]`; hidden states `[batch, seq, dim]` without an output layer.
        """
        args = self.args
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        frequencies = rope_frequencies(
            args.head_dim, args.rope_theta, args.rope_scaling, tokens.device
        )
        rotate = rotation(positions, frequencies)
        mask = self.mask(positions.shape[1], document_ids, tokens.device)

        h = self.tok_embeddings(tokens) if self.tok_embeddings is not None else tokens
        for layer in self.layers.values():
            h = layer(h, rotate, mask)
        h = self.norm(h) if self.norm is not None else h
        return self.output(h) if self.output is not None else h

    def init_weights(self) -> None:
        """Normal weights of std 0.02, less for what writes to the residual stream (GPT-2)."""
        if self.tok_embeddings is not None:
            nn.init.normal_(self.tok_embeddings.weight, std=INIT_STD)
        for layer in self.layers.values():
            layer.init_weights()
        if self.norm is not None:
            self.norm.reset_parameters()
        if self.output is not None and not self._is_tied:
            nn.init.normal_(self.output.weight, std=INIT_STD)

    def to_empty(self, *, device: torch.device | str | int | None, recurse: bool = True) -> Self:
        """As `nn.Module.to_empty`, which gives every module memory of its own, but still tied."""
        super().to_empty(device=device, recurse=recurse)
        self._tie_weights()
        return self

    @property
    def _is_tied(self) -> bool:
        both = self.tok_embeddings is not None and self.output is not None
        return both and self.args.tie_word_embeddings

    def _tie_weights(self) -> None:
        if self._is_tied:
            self.output.weight = self.tok_embeddings.weight
