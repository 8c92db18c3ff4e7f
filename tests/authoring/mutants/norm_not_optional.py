"""The final norm is applied whether it is there or not."""

from __future__ import annotations

import torch
from mutants import base

from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("stages.numbers",)
SAYS = r"split in two stages, .* fails: TypeError.*self\.norm is not None"


class Model(base.Model):
    def forward(self, tokens, positions=None, document_ids=None):
        positions = torch.arange(tokens.shape[1])[None] if positions is None else positions
        mask = self.mask(positions.shape[1], document_ids, positions.device)
        h = self.tok_embeddings(tokens) if self.tok_embeddings is not None else tokens
        for layer in self.layers.values():
            h = layer(h, positions, mask)
        h = self.norm(h)
        return self.output(h) if self.output is not None else h


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, model_cls=Model)


register_train_spec("norm_not_optional", get_train_spec)
