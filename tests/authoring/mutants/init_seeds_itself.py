"""Every parameter is drawn from a generator of the model's own, so the seed has no effect."""

from __future__ import annotations

import torch
from mutants import base

CAUGHT_BY = ("contract.deterministic",)
SAYS = r"two seeds have the same weights"


class Model(base.Model):
    def init_weights(self) -> None:
        super().init_weights()
        generator = torch.Generator().manual_seed(42)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.02, generator=generator)


base.register(__name__, model_cls=Model)
