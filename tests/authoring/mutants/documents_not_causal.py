"""With document_ids, the mask tells documents apart, but tokens see later ones of their own."""

from __future__ import annotations

import torch
from mutants import base

CAUGHT_BY = ("semantics.documents",)
SAYS = r"with document_ids, the first token of a document sees 31 later tokens .* also include the"


class Model(base.Model):
    def forward(self, tokens, positions=None, document_ids=None):
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        mask = self.mask(positions.shape[1], None, positions.device)
        if document_ids is not None:
            mask = document_ids[:, None, :, None] == document_ids[:, None, None, :]
        h = self.tok_embeddings(tokens) if self.tok_embeddings is not None else tokens
        for layer in self.layers.values():
            h = layer(h, positions, mask)
        h = self.norm(h) if self.norm is not None else h
        return self.output(h) if self.output is not None else h


base.register(__name__, model_cls=Model)
