"""Tokens see one more than the window has, which is longer than the checks' sequences."""

from __future__ import annotations

import window
from mutants import base

CAUGHT_BY = ("adapter.hf_numbers",)
SAYS = r"layers\.0 is the first .* from token 128 on.*look at the window or chunk of 128"
HF_CONFIG = window.hf_config()


class Model(base.Model):
    def __init__(self, args):
        super().__init__(args)
        self.mask = base.CausalMask(window=args.sliding_window + 1)


base.register(__name__, model_cls=Model, model_args=window.Args())
