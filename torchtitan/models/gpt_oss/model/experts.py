"""The experts of gpt-oss: clamped SwiGLU with biases."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from torchtitan.models.common.moe import ALIGNMENT, grouped_linear

ALPHA = 1.702
"""With this, x * sigmoid(alpha * x) is close to GELU (arXiv:1606.08415)."""


class GptOssExperts(nn.Module):
    """Feed-forward experts; each kind of parameter is one tensor for all experts.

    Matrices are `[in, out]`, and the features of gate and linear part alternate in `gate_up`, both
    as in Hugging Face checkpoints, so that weights are exchanged by renaming alone.

    Args:
        limit: bounds the gate from above, and the linear part from both sides.
    """

    def __init__(self, num_experts: int, dim: int, hidden_dim: int, limit: float) -> None:
        super().__init__()
        self.limit = limit
        self.product = grouped_linear
        self.gate_up = nn.Parameter(torch.empty(num_experts, dim, 2 * hidden_dim))
        self.gate_up_bias = nn.Parameter(torch.empty(num_experts, 2 * hidden_dim))
        self.down = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.down_bias = nn.Parameter(torch.empty(num_experts, dim))

    def forward(self, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Process rows `[rows, dim]`, sorted by expert; see `GroupedExperts`."""
        ends = counts.cumsum(0, dtype=torch.int32)
        gate_up = self.product(rows, self.gate_up.mT, ends)
        gate_up = add_bias(gate_up, self.gate_up_bias, counts)
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]  # [rows, hidden_dim]
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        hidden = gate * torch.sigmoid(ALPHA * gate) * (up + 1)
        return add_bias(self.product(hidden, self.down.mT, ends), self.down_bias, counts)

    def init_weights(self, std: float, output_std: float) -> None:
        """Draw normal weights; `output_std` is for `down`, which writes to the residual stream."""
        nn.init.normal_(self.gate_up, std=std)
        nn.init.normal_(self.down, std=output_std)
        nn.init.zeros_(self.gate_up_bias)
        nn.init.zeros_(self.down_bias)


def add_bias(rows: torch.Tensor, bias: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Add to each row the bias of its expert.

    Args:
        rows: `[rows, features]`, sorted by expert.
        bias: `[num_experts, features]`.
        counts: number of rows per expert, `[num_experts]` int64.
    """
    return _AddBias.apply(rows, bias, counts)


class _AddBias(torch.autograd.Function):
    """Adds a bias whose gradient is a sum over its rows, by the kernel that multiplies matrices.

    Unlike the gradient of indexing, it is the same in each run, and accumulates in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, bias: torch.Tensor, counts: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(counts)
        ctx.bias_dtype = bias.dtype
        bias = bias.to(rows.dtype)
        return rows + bias.repeat_interleave(counts, dim=0, output_size=len(rows))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (counts,) = ctx.saved_tensors
        ones = grad.new_ones(len(grad), ALIGNMENT)
        ends = counts.cumsum(0, dtype=torch.int32)
        sums = F.grouped_mm(ones.mT, grad.contiguous(), offs=ends)  # [num_experts, 8, features]
        return grad, sums[:, 0].to(ctx.bias_dtype), None
