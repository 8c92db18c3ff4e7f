"""A stage hands the embeddings on in training alone, and pipelines are planned in evaluation."""

from __future__ import annotations

import torch
from mutants import base

CAUGHT_BY = ("stages.numbers", "layouts.pp2")
SAYS = r"split in two stages, .* stage 0 .* passes on 2 tensors in training, but 1 in evaluation"
CRASHES = True


class Model(base.Model):
    def forward(self, tokens, embeddings=None, positions=None, document_ids=None):
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        mask = self.mask(positions.shape[1], document_ids, positions.device)
        h = tokens
        if self.tok_embeddings is not None:
            h = self.tok_embeddings(tokens)
            embeddings = h if self.training else None
        for layer in self.layers.values():
            h = layer(h, positions, mask)
        if self.norm is None:
            return h if embeddings is None else (h, embeddings)
        h = self.norm(h if embeddings is None else h + embeddings)
        return h if self.output is None else self.output(h)


base.register(__name__, model_cls=Model)
