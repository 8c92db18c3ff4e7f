"""A right model with a table of 128 positions, which refuses jobs of longer sequences."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn as nn
from mutants import base

from torchtitan.errors import ConfigError


@dataclass
class Args(base.Args):
    block_size: int = 128

    def get_nparams_and_flops(self, seq_len: int) -> tuple[int, int]:
        nparams, flops = super().get_nparams_and_flops(seq_len)
        return nparams + self.block_size * self.dim, flops

    def update_from_config(self, job_config) -> Args:
        if job_config.training.seq_len > self.block_size:
            raise ConfigError(f"training.seq_len: at most {self.block_size}")
        return replace(self)


class Model(base.Model):
    def __init__(self, args: Args) -> None:
        super().__init__(args)
        self.places = nn.Embedding(args.block_size, args.dim)

    def forward(self, tokens, positions=None, document_ids=None):
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        mask = self.mask(positions.shape[1], document_ids, positions.device)
        h = self.tok_embeddings(tokens) + self.places(positions)
        for layer in self.layers.values():
            h = layer(h, positions, mask)
        return self.output(self.norm(h))

    def init_weights(self) -> None:
        super().init_weights()
        nn.init.normal_(self.places.weight, std=0.02)


base.register(
    __name__, model_cls=Model, model_args=Args(), pipeline_fn=None, state_dict_adapter=None
)
