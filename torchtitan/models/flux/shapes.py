"""Drawings of coloured shapes with captions: data that needs no files, to try the model."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .model.args import FluxModelArgs

COLORS = {
    "red": (1.0, -1.0, -1.0),
    "green": (-1.0, 1.0, -1.0),
    "blue": (-1.0, -1.0, 1.0),
    "yellow": (1.0, 1.0, -1.0),
    "white": (1.0, 1.0, 1.0),
}
SHAPES = ("circle", "square", "cross")
WORDS = (*COLORS, *SHAPES)
_PIXELS = 4
"""Along each side of a place of the latent image."""


class Shapes:
    """Rows as of a table of encoded images, of a fixed random "encoder".

    Args:
        seq_len: patches of an image, a square number.
        held_out: other drawings, for validation.
    """

    def __init__(self, args: FluxModelArgs, seq_len: int, held_out: bool = False) -> None:
        self._args, self._side, self._held_out = args, 2 * math.isqrt(seq_len), held_out
        random = torch.Generator().manual_seed(0)

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=random)

        inputs = 3 * _PIXELS**2
        self._project = draw(args.channels // 4, inputs) / inputs**0.5
        self._t5, self._clip = draw(len(WORDS), args.text_dim), draw(len(WORDS), args.pooled_dim)

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        random = torch.Generator().manual_seed(2 * index + self._held_out)
        color, shape = (
            int(torch.randint(n, (), generator=random)) for n in (len(COLORS), len(SHAPES))
        )
        picture = drawing(shape, list(COLORS.values())[color], self._side * _PIXELS, random)
        places = F.unfold(picture[None], _PIXELS, stride=_PIXELS)[0]
        words = [color, len(COLORS) + shape]
        return {
            "latents": (self._project @ places).unflatten(-1, (self._side, self._side)),
            "t5": self._t5[words],
            "clip": self._clip[words].mean(dim=0),
        }


def drawing(
    shape: int, color: tuple[float, ...], side: int, random: torch.Generator
) -> torch.Tensor:
    """Return a shape somewhere on black, `[3, side, side]` from -1 to 1."""
    radius, *center = torch.rand(3, generator=random).tolist()
    radius = (0.15 + 0.15 * radius) * side
    grid = torch.arange(side) + 0.5
    y, x = (grid - (radius + place * (side - 2 * radius)) for place in center)
    y, x = y[:, None].abs(), x[None].abs()
    inside = (
        y**2 + x**2 < radius**2,
        torch.maximum(y, x) < 0.8 * radius,
        (torch.maximum(y, x) < radius) & (torch.minimum(y, x) < 0.3 * radius),
    )[shape]
    return torch.where(inside, torch.tensor(color)[:, None, None], -1.0)
