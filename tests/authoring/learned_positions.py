"""A right model of another kind: learned positions, which end at `max_seq_len`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
from mutants import base

from torchtitan.distributed.pipeline_parallel import build_pipeline


@dataclass
class Args(base.Args):
    max_seq_len: int = 128

    def get_nparams_and_flops(self, seq_len: int) -> tuple[int, int]:
        nparams, flops = super().get_nparams_and_flops(seq_len)
        return nparams + self.max_seq_len * self.dim, flops


class Attention(base.Attention):
    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return x


class Model(base.with_layers(attention=Attention)):
    def __init__(self, args: Args) -> None:
        super().__init__(args)
        self.embedding = Embedding(args)
        self.tok_embeddings = None

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        h = self.embedding(tokens, positions) if self.embedding is not None else tokens
        return super().forward(h, positions, document_ids)

    def init_weights(self) -> None:
        super().init_weights()
        if self.embedding is not None:
            nn.init.normal_(self.embedding.tokens.weight, std=0.02)
            nn.init.normal_(self.embedding.positions.weight, std=0.02)


class Embedding(nn.Module):
    def __init__(self, args: Args) -> None:
        super().__init__()
        self.tokens = nn.Embedding(args.vocab_size, args.dim)
        self.positions = nn.Embedding(args.max_seq_len, args.dim)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.tokens(tokens) + self.positions(positions)


base.register(
    __name__,
    model_cls=Model,
    model_args=Args(),
    pipeline_fn=partial(build_pipeline, first_modules=("embedding",)),
    state_dict_adapter=None,
)
