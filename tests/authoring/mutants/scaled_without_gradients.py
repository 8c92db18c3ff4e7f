"""What attention puts out is scaled where no gradients are wanted, as in a path for generation."""

from __future__ import annotations

import torch
from mutants import base

CAUGHT_BY = ("semantics.evaluation",)
SAYS = r"under torch\.no_grad\(\), the logits differ by .* is layers\.0\.attention\b"


class Attention(base.Attention):
    def forward(self, x, positions, mask):
        out = super().forward(x, positions, mask)
        return out if torch.is_grad_enabled() else 1.1 * out


base.register(__name__, model_cls=base.with_layers(attention=Attention))
