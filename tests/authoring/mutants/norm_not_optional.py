"""The final norm is applied whether it is there or not."""

from __future__ import annotations

import torch
from mutants import base

CAUGHT_BY = ("stages.numbers",)
SAYS = r"split in two stages, .* fails: TypeError.* \(.*_optional\.py:\d+\).*self\.norm is not None"


class Model(base.Model):
    def forward(self, tokens, positions=None, document_ids=None):
        positions = torch.arange(tokens.shape[1])[None] if positions is None else positions
        mask = self.mask(positions.shape[1], document_ids, positions.device)
        h = self.tok_embeddings(tokens) if self.tok_embeddings is not None else tokens
        for layer in self.layers.values():
            h = layer(h, positions, mask)
        h = self.norm(h)
        return self.output(h) if self.output is not None else h


base.register(__name__, model_cls=Model)
