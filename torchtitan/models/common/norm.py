"""Norms that PyTorch lacks or computes more slowly."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` for outputs of a linear layer: bfloat16 under autocast, unlike the weight.

    `nn.RMSNorm` computes the same numbers then, but on CUDA with one kernel for each operation.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., dim]` -> `[..., dim]`, of the same dtype."""
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        shape = list(self.normalized_shape)
        return F.rms_norm(x.float(), shape, self.weight.float(), self.eps).type_as(x)


class ZeroCenteredRMSNorm(nn.Module):
    """x / rms(x) * (1 + weight), in float32 (Gemma, arXiv:2403.08295).

    The weight starts at 0, where bfloat16 resolves small changes better than near 1.

    Args:
        dim: size of the last dimension, which is normalised.
        eps: added to the mean of the squares.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., dim]` -> `[..., dim]`, of the same dtype."""
        weight = 1 + self.weight.float()
        return F.rms_norm(x.float(), weight.shape, weight, self.eps).type_as(x)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
