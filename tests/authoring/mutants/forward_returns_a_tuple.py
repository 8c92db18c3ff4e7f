"""forward returns the logits and a loss of its own."""

from __future__ import annotations

import torch
from mutants import base

CAUGHT_BY = ("contract.forward",)
SAYS = r"returns tuple, not logits"


class Model(base.Model):
    def forward(self, tokens, positions=None, document_ids=None):
        return super().forward(tokens, positions, document_ids), torch.zeros(())


base.register(__name__, model_cls=Model)
