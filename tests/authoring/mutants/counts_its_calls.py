"""A layer keeps a count of its calls, and computes something else in every second one."""

from __future__ import annotations

from mutants import base

CAUGHT_BY = ("layouts.one_device",)
SAYS = r"two forward passes of the same tokens differ by .* must not keep state"


class FeedForward(base.FeedForward):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (1 + self.calls % 2)


base.register(__name__, model_cls=base.with_layers(feed_forward=FeedForward))
