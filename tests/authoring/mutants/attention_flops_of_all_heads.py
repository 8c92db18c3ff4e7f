"""Attention's FLOPs are multiplied by the heads, though the features of all heads are dim."""

from __future__ import annotations

from mutants import base

CAUGHT_BY = ("cost.flops",)
SAYS = r"for each key that a token attends to, 4\.00 times"


class Args(base.Args):
    def get_nparams_and_flops(self, seq_len):
        nparams, flops = super().get_nparams_and_flops(seq_len)
        return nparams, flops + 12 * self.n_layers * (self.n_heads - 1) * self.dim * seq_len


base.register(__name__, model_args=Args())
