"""Rotary angles are computed in the dtype of the weights, in which positions are too coarse."""

from __future__ import annotations

import torch
from mutants import base

CAUGHT_BY = ("numerics.bf16_positions",)
SAYS = r"with bfloat16 parameters, .* positions from 4000 on, .*shows it is layers\.0\.attention"


class Attention(base.Attention):
    def rotate(self, x, positions):
        half = x.shape[-1] // 2
        dtype = self.wq.weight.dtype
        frequencies = (self.theta ** (-torch.arange(half) / half)).to(dtype)
        angles = positions[..., None, None].to(dtype) * frequencies
        a, b = x.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


base.register(__name__, model_cls=base.with_layers(attention=Attention))
