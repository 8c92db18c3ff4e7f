"""Rotary frequencies are made without a device: on a GPU, they are on the CPU."""

from __future__ import annotations

import torch
from mutants import base

CAUGHT_BY = ("contract.device",)
SAYS = (
    r"torch\.arange \(.*angles_on_the_cpu\.py:18\) makes a tensor on the CPU.*"
    r"Tensor\.mul \(.*angles_on_the_cpu\.py:19\)"
)


class Attention(base.Attention):
    def rotate(self, x, positions):
        half = self.head_dim // 2
        frequencies = self.theta ** (-torch.arange(half, dtype=torch.float32) / half)
        angles = positions[..., None, None].float() * frequencies
        a, b = x.float().chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


base.register(__name__, model_cls=base.with_layers(Attention))
