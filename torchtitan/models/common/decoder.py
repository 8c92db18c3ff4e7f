"""The common part of decoder-only language models: everything around the blocks.

A model provides its block and its hyperparameters; see `models/llama3/model/model.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn as nn

from torchtitan.models.common.attention import AttentionMask, CausalMask
from torchtitan.models.common.rope import Rotation
from torchtitan.models.common.scaled_rope import scaled_rotation
from torchtitan.protocols.model import ModelProtocol

INIT_STD = 0.02


def residual_std(layer_id: int) -> float:
    """Return the standard deviation for layer `layer_id`'s matrices that write to the residual.

    2 (layer_id + 1) sublayers have written to the stream by then. Later ones write less, so that
    their sum grows slowly with depth (DS-Init, arXiv:1908.11365).
    """
    return INIT_STD / (2 * (layer_id + 1)) ** 0.5


class Decoder(ModelProtocol):
    """A decoder-only language model. In a pipeline stage, layers may be deleted and other parts may
    be None.

    Args:
        args: with `dim`, `n_layers`, `vocab_size`, `norm_eps`, `head_dim`, `rope_theta`,
            `tie_word_embeddings` and `attention`; and `rope_scaling`, if there is any.
        block: returns the block of a layer, given the layer's number and `args`. The block has
            `forward(x, rotate, mask)` and `init_weights()`.
    """

    def __init__(self, args: Any, block: Callable[[int, Any], nn.Module]) -> None:
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleDict({str(i): block(i, args) for i in range(args.n_layers)})
        self.norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        self.mask = CausalMask(args.attention)
        if args.tie_word_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def rotation(self, positions: torch.Tensor) -> Rotation:
        """Return the rotation of queries and keys at `positions` `[batch or 1, seq]`."""
        args = self.args
        scaling = getattr(args, "rope_scaling", None)
        return scaled_rotation(positions, args.head_dim, args.rope_theta, scaling)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[batch, seq]` int64 -> `[batch, seq, dim]`."""
        return self.tok_embeddings(tokens)

    def attention_inputs(
        self, positions: torch.Tensor, document_ids: torch.Tensor | None
    ) -> Mapping[str, tuple[Callable[..., Any], AttentionMask]]:
        """Return layer name -> the rotation of its queries and keys, and its attention mask.

        Both are the same for all layers here. The arguments are those of `forward`.
        """
        rotate = self.rotation(positions)
        mask = self.mask(positions.shape[1], document_ids, positions.device)
        return dict.fromkeys(self.layers, (rotate, mask))

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the logits of the next token.

        Args:
            tokens: `[batch, seq]` int64; hidden states `[batch, seq, dim]` without an embedding.
            positions: `[batch, seq]` or `[1, seq]` int64; None counts from 0.
            document_ids: `[batch, seq]` int64; tokens attend only within their document. None: the
                sequence is one document.

        Returns:
            `[batch, seq, vocab]`; hidden states `[batch, seq, dim]` without an output layer.
        """
        h, _ = self.hidden_states(tokens, positions, document_ids)
        return self.output(h) if self.output is not None else h

    def hidden_states(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None,
        document_ids: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Mapping[str, tuple[Callable[..., Any], AttentionMask]]]:
        """Return the input of the output layer, `[batch, seq, dim]`, and `attention_inputs`.

        The arguments are those of `forward`.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        inputs = self.attention_inputs(positions, document_ids)

        h = self.embed(tokens) if self.tok_embeddings is not None else tokens
        for name, layer in self.layers.items():
            h = layer(h, *inputs[name])
        return self.norm(h) if self.norm is not None else h, inputs

    def init_weights(self) -> None:
        """Draw normal weights of std 0.02, less for those that write to the residual.

        The output layer, tied or not, has std 1 / sqrt(dim), which gives logits of std 1.
        """
        if self.tok_embeddings is not None:
            nn.init.normal_(self.tok_embeddings.weight, std=INIT_STD)
        layer: Any  # returned by `block`
        for layer in self.layers.values():
            layer.init_weights()
        if self.norm is not None:
            self.norm.reset_parameters()
        if self.output is not None:
            nn.init.normal_(self.output.weight, std=self.args.dim**-0.5)
