"""The experts of Llama 4, in the layout of its Hugging Face checkpoints."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

from torchtitan.models.common.moe import grouped_linear


class Llama4Experts(nn.Module):
    """Gated feed-forward experts (SwiGLU). Gate and input matrices are one tensor, side by side.

    Args:
        num_experts: number of experts.
        dim: features of the hidden states.
        hidden_dim: hidden features of each expert.
    """

    def __init__(self, num_experts: int, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(num_experts, dim, 2 * hidden_dim))
        self.down = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.product = grouped_linear

    def forward(self, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Process rows `[rows, dim]`, sorted by expert; see `GroupedExperts`."""
        ends = counts.cumsum(0, dtype=torch.int32)
        gate, up = self.product(rows, self.gate_up.mT, ends).chunk(2, dim=-1)
        return self.product(F.silu(gate) * up, self.down.mT, ends)

    def init_weights(self, std: float, output_std: float) -> None:
        """Draw normal weights; `output_std` is for `down`, which writes to the residual stream."""
        nn.init.normal_(self.gate_up, std=std)
        nn.init.normal_(self.down, std=output_std)
