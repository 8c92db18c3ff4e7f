"""Rotary angles are a matrix product, which autocast computes in bfloat16."""

from __future__ import annotations

import torch
from mutants import base

CAUGHT_BY = ("numerics.bf16_positions",)
SAYS = r"with autocast, .* positions from 4000 on, .*shows it is layers\.0\.attention"


class Attention(base.Attention):
    def rotate(self, x, positions):
        half = x.shape[-1] // 2
        frequencies = self.theta ** (-torch.arange(half) / half)
        angles = positions[..., None].float() @ frequencies[None]
        a, b = x.chunk(2, dim=-1)
        cos, sin = angles[:, :, None].cos(), angles[:, :, None].sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


base.register(__name__, model_cls=base.with_layers(attention=Attention))
