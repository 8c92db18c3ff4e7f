"""A norm that PyTorch computes more slowly."""

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
