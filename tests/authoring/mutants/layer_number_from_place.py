"""A layer's strength depends on its place in the dict, which differs in a pipeline stage."""

from __future__ import annotations

import torch
from mutants import base

CAUGHT_BY = (
    "stages.numbers",
    "layouts.pp2",
)
SAYS = r"split in two stages.* the first layer whose output differs is layers\.[23]"


class Model(base.Model):
    def forward(self, tokens, positions=None, document_ids=None):
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        mask = self.mask(positions.shape[1], document_ids, positions.device)
        h = self.tok_embeddings(tokens) if self.tok_embeddings is not None else tokens
        for place, layer in enumerate(self.layers.values(), start=1):
            h = h + (layer(h, positions, mask) - h) / place
        h = self.norm(h) if self.norm is not None else h
        return self.output(h) if self.output is not None else h


base.register(__name__, model_cls=Model)
