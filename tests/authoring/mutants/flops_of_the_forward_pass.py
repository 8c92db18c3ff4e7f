"""The backward pass is not counted."""

from __future__ import annotations

from mutants import base

CAUGHT_BY = ("cost.flops",)
SAYS = r"0\.33 times.*only the forward pass"


class Args(base.Args):
    def get_nparams_and_flops(self, seq_len):
        nparams, flops = super().get_nparams_and_flops(seq_len)
        return nparams, flops // 3


base.register(__name__, model_args=Args())
