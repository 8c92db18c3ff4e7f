"""YaRN: rotary positions for contexts longer than those trained on (arXiv:2309.00071).

Fast rotations stay as they are, slow ones are slowed down by the extension factor, and the
attention scores grow with its logarithm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from .ranges import NonNegativeFloat, PositiveFloat, Size
from .rope import rope_frequencies


@dataclass(frozen=True)
class YarnScaling:
    """Slows rotations down by `factor`, for contexts beyond `original_max_seq_len` tokens."""

    rope_type: ClassVar[str] = "yarn"

    factor: PositiveFloat = 40.0
    original_max_seq_len: Size = 4096
    beta_fast: PositiveFloat = 32.0
    """Rotations that turn at least this often within the original context stay as they are."""
    beta_slow: PositiveFloat = 1.0
    """Rotations that turn at most this often are slowed down in full."""
    mscale: NonNegativeFloat = 1.0
    """Growth of the rotated queries and keys, as a multiple of the paper's."""
    mscale_all_dim: NonNegativeFloat = 0.0
    """Growth of all features of queries and keys; the rotated ones grow that much less (DeepSeek).
    """
    truncate: bool = True
    """Make the change begin and end at whole feature pairs."""

    def __post_init__(self) -> None:
        if self.beta_fast < self.beta_slow:
            raise ValueError(
                f"beta_fast ({self.beta_fast}) must be at least beta_slow ({self.beta_slow})"
            )

    @property
    def rotation_factor(self) -> float:
        """Return the factor of rotated queries and keys."""
        return self._growth(self.mscale) / self._growth(self.mscale_all_dim)

    @property
    def score_factor(self) -> float:
        """Return the additional factor of attention scores."""
        return self._growth(self.mscale_all_dim) ** 2

    def _growth(self, mscale: float) -> float:
        return 1.0 + 0.1 * mscale * math.log(max(self.factor, 1.0))

    def frequencies(
        self, head_dim: int, theta: float, device: torch.device | None = None
    ) -> torch.Tensor:
        """Return the scaled `rope_frequencies`."""

        def pair_that_turns(times: float) -> float:
            """Return which pair, a fraction, turns this often within the original context."""
            wavelength = self.original_max_seq_len / times
            return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(theta))

        first, last = pair_that_turns(self.beta_fast), pair_that_turns(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        last = max(last, first + 0.001)  # avoids a division by zero

        frequencies = rope_frequencies(head_dim, theta, device)
        pairs = torch.arange(head_dim // 2, dtype=torch.float32, device=device)
        slowed = ((pairs - first) / (last - first)).clamp(0, 1)
        return frequencies * (1 - slowed) + frequencies / self.factor * slowed
