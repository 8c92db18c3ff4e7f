"""Hidden states are scaled by the number of sequences in a forward pass."""

from __future__ import annotations

from mutants import base

from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = (
    "layouts.accumulation",
    "layouts.fsdp2",
    "layouts.pp2",
)
SAYS = r"first module whose output differs is layers\.0\.feed_forward"


class FeedForward(base.FeedForward):
    def forward(self, x):
        return super().forward(x) * x.shape[0]


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, model_cls=base.with_layers(feed_forward=FeedForward))


register_train_spec("batch_in_the_scale", get_train_spec)
