"""The experts of gpt-oss: clamped SwiGLU with biases."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

from torchtitan.models.common.moe import ALIGNMENT, grouped_linear

ALPHA = 1.702
"""With it, x * sigmoid(alpha * x) is close to GELU (arXiv:1606.08415)."""


class GptOssExperts(nn.Module):
    """Feed-forward experts, the parameters of all in one tensor a kind.

    Matrices are `[in, out]`, and features of gate and linear part alternate in `gate_up`, both as
    in Hugging Face checkpoints, so that weights are exchanged by renaming alone.

    Args:
        limit: bounds the gate from above, and the linear part from both sides.
    """

    def __init__(self, num_experts: int, dim: int, hidden_dim: int, limit: float) -> None:
        super().__init__()
        if dim % ALIGNMENT:
            raise ValueError(f"dim ({dim}) must be a multiple of {ALIGNMENT}")
        self.limit = limit
        self.gate_up = nn.Parameter(torch.empty(num_experts, dim, 2 * hidden_dim))
        self.gate_up_bias = nn.Parameter(torch.empty(num_experts, 2 * hidden_dim))
        self.down = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.down_bias = nn.Parameter(torch.empty(num_experts, dim))

    def forward(self, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Process rows that are sorted by expert.

        Args:
            rows: `[rows, dim]`.
            counts: rows of each expert, `[num_experts]` int64.

        Returns:
            `[rows, dim]`.
        """
        ends = counts.cumsum(0, dtype=torch.int32)
        expert = torch.arange(len(counts), device=counts.device)
        expert = expert.repeat_interleave(counts, output_size=len(rows))  # of each row

        gate_up = grouped_linear(rows, self.gate_up.mT, ends) + bias_of(expert, self.gate_up_bias)
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]  # [rows, hidden_dim]
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        hidden = gate * torch.sigmoid(ALPHA * gate) * (up + 1)
        return grouped_linear(hidden, self.down.mT, ends) + bias_of(expert, self.down_bias)

    def init_weights(self, std: float, output_std: float) -> None:
        """Normal weights; `output_std` is for `down`, which writes to the residual stream."""
        nn.init.normal_(self.gate_up, std=std)
        nn.init.normal_(self.down, std=output_std)
        nn.init.zeros_(self.gate_up_bias)
        nn.init.zeros_(self.down_bias)


def bias_of(expert: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Row `expert[i]` of `bias` for each i.

    A look-up as in an embedding, whose gradients are added up in order and in float32, unlike those
    of indexing: they are the same in each run, and exact for many rows in bfloat16 too.
    """
    return F.embedding(expert, bias)
