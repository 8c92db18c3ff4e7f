"""Rotary positions are counted within a rank's part of the sequence, not those that it is given."""

from __future__ import annotations

import torch
from mutants import base

CAUGHT_BY = (
    "layouts.cp2",
    "layouts.cp2_ulysses",
)
SAYS = r"first module whose output differs is layers\.0\.attention\..* tokens .* `positions`"


class Model(base.Model):
    def forward(self, tokens, positions=None, document_ids=None):
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        return super().forward(tokens, positions, document_ids)


base.register(__name__, model_cls=Model)
