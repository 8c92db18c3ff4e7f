"""Stages hand on the hidden states without the condition, which later ones then lack."""

from __future__ import annotations

import tiny_own_batches as own
import torch

from torchtitan.protocols import register_train_spec

CAUGHT_BY = ("stages.numbers", "layouts.pp2")
SAYS = r"split in two stages, with its batch.*layers\.2"


class Diffusion(own.Diffusion):
    def forward(self, tokens, condition=None, classes=None, times=None):
        if self.embed is None and condition is None:
            condition = torch.zeros(len(tokens), tokens.shape[-1])
        hidden = super().forward(tokens, condition, classes, times)
        return hidden[0] if self.final is None else hidden


register_train_spec("diffusion_condition_dropped", lambda flavor: own.diffusion(Diffusion))
