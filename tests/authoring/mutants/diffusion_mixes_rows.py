"""Latents are divided by the standard deviation of the whole batch."""

from __future__ import annotations

import tiny_own_batches as own

from torchtitan.protocols import register_train_spec

CAUGHT_BY = ("semantics.batch", "contract.loss", "layouts.accumulation")
SAYS = r"a row alone gives a different output than in a batch of 3"


class Diffusion(own.Diffusion):
    def forward(self, tokens, condition=None, classes=None, times=None):
        if self.embed is not None:
            tokens = tokens / tokens.std()
        return super().forward(tokens, condition, classes, times)


register_train_spec("diffusion_mixes_rows", lambda flavor: own.diffusion(Diffusion))
