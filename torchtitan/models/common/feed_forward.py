"""Gated feed-forward layers: SwiGLU, GeGLU (arXiv:2002.05202)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F


class FeedForward(nn.Module):
    """w2(activation(w1 x) * w3 x), without biases.

    Args:
        dim: features of the hidden states.
        hidden_dim: features between the matrices.
        activation: applied elementwise; silu makes SwiGLU, gelu GeGLU.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        activation: Callable[[torch.Tensor], torch.Tensor] = F.silu,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, seq, dim]` -> `[batch, seq, dim]`."""
        return self.w2(self.activation(self.w1(x)) * self.w3(x))

    def init_weights(self, std: float, output_std: float) -> None:
        """Draw normal weights; `output_std` is for w2, which writes to the residual stream."""
        nn.init.normal_(self.w1.weight, std=std)
        nn.init.normal_(self.w3.weight, std=std)
        nn.init.normal_(self.w2.weight, std=output_std)
