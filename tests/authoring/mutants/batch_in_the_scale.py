"""Hidden states are scaled by the number of sequences in a forward pass."""

from __future__ import annotations

from mutants import base

CAUGHT_BY = (
    "layouts.accumulation",
    "layouts.fsdp2",
    "layouts.pp2",
)
SAYS = r"first module whose output differs is layers\.0\.feed_forward"


class FeedForward(base.FeedForward):
    def forward(self, x):
        return super().forward(x) * x.shape[0]


base.register(__name__, model_cls=base.with_layers(feed_forward=FeedForward))
