"""A pipeline stage that ends before the norm leaves out what only training computes."""

from __future__ import annotations

import torch
from mutants import base

CAUGHT_BY = ("stages.numbers",)
SAYS = r"split in layers and the rest, with one document in training, the logits differ by"


class Model(base.Model):
    def forward(self, tokens, positions=None, document_ids=None):
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        mask = self.mask(positions.shape[1], document_ids, positions.device)
        h = self.tok_embeddings(tokens) if self.tok_embeddings is not None else tokens
        for layer in self.layers.values():
            h = layer(h, positions, mask)
        if self.norm is None:
            return h
        if self.training and self.layers:
            h = h + h.roll(1, dims=1)
        h = self.norm(h)
        return self.output(h) if self.output is not None else h


base.register(__name__, model_cls=Model)
