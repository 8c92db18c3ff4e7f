"""Right models whose layers have one projection together, or all that tensor parallelism splits in
the feed-forward layer, as ALBERT's and Zamba's share more.
"""

from __future__ import annotations

import recurrent
from mutants import base


class Args(recurrent.Args):
    def get_nparams_and_flops(self, seq_len: int) -> tuple[int, int]:
        nparams, flops = super().get_nparams_and_flops(seq_len)
        return nparams - (self.n_layers - 1) * self.dim**2, flops


class Model(recurrent.Model):
    def __init__(self, args: Args) -> None:
        super().__init__(args)
        for layer in self.layers.values():
            layer.wo = self.layers["0"].wo


base.register(
    "shared_projection",
    model_cls=Model,
    model_args=Args(),
    pipeline_fn=None,
    state_dict_adapter=None,
)


class FeedForwardArgs(base.Args):
    def get_nparams_and_flops(self, seq_len: int) -> tuple[int, int]:
        nparams, flops = super().get_nparams_and_flops(seq_len)
        return nparams - 3 * (self.n_layers - 1) * self.dim * self.ffn_dim, flops


class SharedFeedForward(base.Model):
    def __init__(self, args: base.Args) -> None:
        super().__init__(args)
        for layer in self.layers.values():
            layer.feed_forward = self.layers["0"].feed_forward


base.register(
    "shared_feed_forward",
    model_cls=SharedFeedForward,
    model_args=FeedForwardArgs(),
    pipeline_fn=None,
)
