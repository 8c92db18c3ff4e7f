"""Rotary position embedding (RoFormer, arXiv:2104.09864), with Llama 3.1's long-context scaling.

Which features of a head form a rotated pair is a convention. The two in use differ by a fixed
permutation of the rows of wq and wk. Each model here follows its Hugging Face checkpoints, so that
weights are exchanged by renaming alone and no rows move between the ranks that share a matrix:

* features i and i + head_dim / 2 ("half rotation"): most models; both halves are contiguous;
* features 2i and 2i + 1 ("interleaved"): DeepSeek, Llama 4, and Meta's own files of Llama 3.

There is no table of angles. The angles of the current positions are computed once per forward pass,
which costs almost nothing, sets no limit on the length, and leaves no buffer to initialise, to
save, or to lose precision when a model is cast to bfloat16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .ranges import PositiveFloat, Size


class Rotation:
    """Rotates the queries and keys of given positions.

    One is created per forward pass, and all blocks share it. It is a plain object because FSDP's
    mixed precision casts the floating-point arguments of blocks to bfloat16, even in tuples and
    dataclasses, and that is too coarse for angles.

    Args:
        cos: `[batch or 1, seq, 1, head_dim]`, float32.
        sin: like `cos`, with the sign for its feature: minus for the first of each pair.
        interleaved: features 2i and 2i + 1 are a pair, rather than i and i + head_dim / 2.
    """

    def __init__(self, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> None:
        self.cos = cos
        self.sin = sin
        self.interleaved = interleaved

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate `x` `[batch, seq, heads, head_dim]` in float32, and return it in its dtype."""
        if torch.compiler.is_compiling():  # the compiler fuses these operations
            wide = x.float()
            if self.interleaved:
                partner = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
            else:
                partner = wide.roll(x.shape[-1] // 2, dims=-1)
            return torch.addcmul(wide * self.cos, partner, self.sin).to(x.dtype)
        return _Rotate.apply(x, self.cos, self.sin, self.interleaved)


class _Rotate(torch.autograd.Function):
    """The same with half as many passes over memory; its backward pass rotates back."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rotate(x, cos, sin, interleaved)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin, ctx.interleaved), None, None, None


def _rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    def halves(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if interleaved:
            return tensor.unflatten(-1, (-1, 2)).unbind(-1)
        return tensor.chunk(2, dim=-1)

    out = x * cos  # float32
    for part, partner, factor in zip(halves(out), reversed(halves(x)), halves(sin), strict=True):
        part.addcmul_(partner, factor)
    return out.to(x.dtype)


def rope_frequencies(
    head_dim: int, theta: float, device: torch.device | None = None
) -> torch.Tensor:
    """Return the angle per position of each feature pair: `[head_dim / 2]`, float32, radians."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    return 1.0 / theta**exponents


@dataclass(frozen=True)
class RopeScaling:
    """Slows slow rotations down by `factor`, for contexts beyond `original_max_seq_len` tokens.

    Rotations that turn at least `high_freq_factor` times within the original context stay as they
    are, those that turn at most `low_freq_factor` times are slowed down in full, and in between the
    change is gradual (Llama 3.1, arXiv:2407.21783).
    """

    rope_type: ClassVar[str] = "llama3"
    rotation_factor: ClassVar[float] = 1.0

    factor: PositiveFloat = 8.0
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0
    original_max_seq_len: Size = 8192

    def __post_init__(self) -> None:
        if self.high_freq_factor < self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor ({self.high_freq_factor}) must be at least low_freq_factor "
                f"({self.low_freq_factor})"
            )

    def frequencies(
        self, head_dim: int, theta: float, device: torch.device | None = None
    ) -> torch.Tensor:
        """Return the scaled `rope_frequencies`."""
        frequencies = rope_frequencies(head_dim, theta, device)
        turns = self.original_max_seq_len / (2 * math.pi / frequencies)
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        # In this order, it is rounded as in transformers, which shows far from the beginning.
        return (1 - kept) * frequencies / self.factor + kept * frequencies


def rotation(
    positions: torch.Tensor,
    frequencies: torch.Tensor,
    interleaved: bool = False,
    factor: float = 1.0,
) -> Rotation:
    """Return the rotation of given positions.

    Args:
        positions: `[batch or 1, seq]`.
        frequencies: `[head_dim / 2]`, from `rope_frequencies` or the like.
        interleaved: see `Rotation`.
        factor: additional factor of the rotated features (YaRN).
    """
    angles = positions[..., None, None].float() * frequencies
    cos, sin = angles.cos() * factor, angles.sin() * factor
    if interleaved:
        cos, sin = torch.stack([cos, cos], dim=-1), torch.stack([-sin, sin], dim=-1)
        return Rotation(cos.flatten(-2), sin.flatten(-2), interleaved)
    return Rotation(torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1))
