"""The model computes rotary angles once, and FSDP rounds them when it calls the layers."""

from __future__ import annotations

import torch
from mutants import base

CAUGHT_BY = ("numerics.bf16_positions",)
SAYS = (
    r"arguments of layers, .* at positions from 4000 .* FSDP casts .* Pass on their cosine and sine"
)


class Attention(base.Attention):
    def rotate(self, x, angles):
        cos, sin = angles.cos(), angles.sin()
        a, b = x.float().chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Model(base.Model):
    def forward(self, tokens, positions=None, document_ids=None):
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        mask = self.mask(positions.shape[1], document_ids, positions.device)
        half = self.args.dim // self.args.n_heads // 2
        places = torch.arange(half, device=tokens.device, dtype=torch.float32)
        angles = positions[..., None, None].float() * self.args.rope_theta ** (-places / half)
        h = self.tok_embeddings(tokens) if self.tok_embeddings is not None else tokens
        for layer in self.layers.values():
            h = layer(h, angles, mask)
        h = self.norm(h) if self.norm is not None else h
        return self.output(h) if self.output is not None else h


base.register(__name__, model_cls=base.with_layers(attention=Attention, model=Model))
