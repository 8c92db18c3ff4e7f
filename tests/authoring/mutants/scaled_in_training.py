"""What attention puts out is scaled in training alone."""

from __future__ import annotations

from mutants import base

CAUGHT_BY = ("semantics.evaluation",)
SAYS = r"in training, the logits differ by .* is layers\.0\.attention\b"


class Attention(base.Attention):
    def forward(self, x, positions, mask):
        out = super().forward(x, positions, mask)
        return 0.9 * out if self.training else out


base.register(__name__, model_cls=base.with_layers(attention=Attention))
