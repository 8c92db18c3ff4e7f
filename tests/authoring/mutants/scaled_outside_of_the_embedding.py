"""Hidden states are scaled where the embedding is absent too: in every pipeline stage."""

from __future__ import annotations

import torch
from mutants import base

CAUGHT_BY = ("stages.numbers",)
SAYS = r"split in two stages, .* the logits differ by .* such as scaling"


class Model(base.Model):
    def forward(self, tokens, positions=None, document_ids=None):
        h = self.tok_embeddings(tokens) if self.tok_embeddings is not None else tokens
        h = h * 8.0
        positions = torch.arange(tokens.shape[1])[None] if positions is None else positions
        mask = self.mask(positions.shape[1], document_ids, positions.device)
        for layer in self.layers.values():
            h = layer(h, positions, mask)
        h = self.norm(h + 1) if self.norm is not None else h
        return self.output(h) if self.output is not None else h


base.register(__name__, model_cls=Model)
