"""Drawings of coloured shapes with captions: data that needs no files, to try the model."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from torchtitan.errors import ConfigError

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
_PIXELS = 2
"""Along each side of a place of the latent image."""


class ShapeEncoders:
    """Fixed random projections in place of trained encoders."""

    scale = _PIXELS

    def __init__(self, args: FluxModelArgs) -> None:
        random = torch.Generator().manual_seed(0)

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=random)

        self._project = torch.linalg.qr(draw(args.channels // 4, 3 * _PIXELS**2)).Q
        self._t5, self._clip = draw(len(WORDS), args.text_dim), draw(len(WORDS), args.pooled_dim)

    def text(self, captions: list[str], text_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return states `[captions, text_len, _]` and vectors `[captions, _]`."""
        t5, clip = [], []
        for caption in captions:
            if unknown := [word for word in caption.split() if word not in WORDS]:
                raise ConfigError(f"{caption!r}: no word {unknown[0]!r}. Known: {', '.join(WORDS)}")
            words = [WORDS.index(word) for word in caption.split()]
            t5.append(F.pad(self._t5[words], (0, 0, 0, text_len - len(words))))
            clip.append(self._clip[words].mean(dim=0))
        return torch.stack(t5), torch.stack(clip)

    def latents(self, pixels: torch.Tensor) -> torch.Tensor:
        """`[batch, 3, height, width]` from -1 to 1 -> `[batch, _, height / 2, width / 2]`."""
        return torch.einsum("cp,bphw->bchw", self._project, F.pixel_unshuffle(pixels, _PIXELS))

    def pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """Invert `latents`."""
        places = torch.einsum("cp,bchw->bphw", self._project, latents)
        return F.pixel_shuffle(places, _PIXELS)


class Shapes:
    """Rows as of a table of encoded images.

    Args:
        seq_len: patches of an image, a square number.
        held_out: other drawings, for validation.
    """

    def __init__(self, args: FluxModelArgs, seq_len: int, held_out: bool = False) -> None:
        self._encoders, self._text_len = ShapeEncoders(args), args.text_len
        self._side, self._held_out = 2 * _PIXELS * math.isqrt(seq_len), held_out

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        random = torch.Generator().manual_seed(2 * index + self._held_out)
        color, shape = (
            names[int(torch.randint(len(names), (), generator=random))]
            for names in (tuple(COLORS), SHAPES)
        )
        picture = drawing(shape, COLORS[color], self._side, random)
        (t5,), (clip,) = self._encoders.text([f"{color} {shape}"], self._text_len)
        return {"latents": self._encoders.latents(picture[None])[0], "t5": t5, "clip": clip}


def drawing(
    shape: str, color: tuple[float, ...], side: int, random: torch.Generator
) -> torch.Tensor:
    """Return a shape somewhere on black, `[3, side, side]` from -1 to 1."""
    radius, *center = torch.rand(3, generator=random).tolist()
    radius = (0.15 + 0.15 * radius) * side
    grid = torch.arange(side) + 0.5
    y, x = (grid - (radius + place * (side - 2 * radius)) for place in center)
    y, x = y[:, None].abs(), x[None].abs()
    inside = {
        "circle": y**2 + x**2 < radius**2,
        "square": torch.maximum(y, x) < 0.8 * radius,
        "cross": (torch.maximum(y, x) < radius) & (torch.minimum(y, x) < 0.3 * radius),
    }[shape]
    return torch.where(inside, torch.tensor(color)[:, None, None], -1.0)
