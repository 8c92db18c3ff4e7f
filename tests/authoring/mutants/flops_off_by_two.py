"""Multiplications and additions are counted twice."""

from __future__ import annotations

from mutants import base

CAUGHT_BY = ("cost.flops",)
SAYS = r"2\.00 times.*already 2 FLOPs"


class Args(base.Args):
    def get_nparams_and_flops(self, seq_len):
        nparams, flops = super().get_nparams_and_flops(seq_len)
        return nparams, 2 * flops


base.register(__name__, model_args=Args())
