"""YaRN: rotary positions for contexts longer than those trained on (arXiv:2309.00071).

Fast rotations stay as they are, slow ones are slowed down by the extension factor, and the
attention scores grow with its logarithm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from .hf_config import require_numbers, unsupported
from .rope import rope_frequencies


@dataclass(frozen=True)
class YarnScaling:
    """Slows rotations down by `factor`, for contexts beyond `original_max_seq_len` tokens."""

    factor: float = 40.0
    original_max_seq_len: int = 4096
    beta_fast: float = 32.0
    """Rotations that turn at least this often within the original context stay as they are."""
    beta_slow: float = 1.0
    """Rotations that turn at most this often are slowed down in full."""
    mscale: float = 1.0
    """Growth of the rotated queries and keys, as a multiple of the paper's."""
    mscale_all_dim: float = 0.0
    """Growth of all features of queries and keys; the rotated ones grow that much less (DeepSeek).
    """
    truncate: bool = True
    """Make the change begin and end at whole feature pairs."""

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


_HF_NAMES = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_seq_len",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "truncate": "truncate",
}


def yarn_frequencies(
    head_dim: int, theta: float, scaling: YarnScaling, device: torch.device | None = None
) -> torch.Tensor:
    """Return the angle per position of each feature pair: `[head_dim / 2]`, float32, radians."""

    def pair_that_turns(times: float) -> float:
        """Return which pair, a fraction, turns this often within the original context."""
        wavelength = scaling.original_max_seq_len / times
        return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    last = max(last, first + 0.001)  # avoids a division by zero

    frequencies = rope_frequencies(head_dim, theta, device=device)
    pairs = torch.arange(head_dim // 2, dtype=torch.float32, device=device)
    slowed = ((pairs - first) / (last - first)).clamp(0, 1)
    return frequencies * (1 - slowed) + frequencies / scaling.factor * slowed


def yarn_from_hf(rope_scaling: dict[str, Any]) -> YarnScaling:
    """Read the `rope_scaling` of a `config.json`, as `HuggingFaceConfig.take_rope` returns it.

    Raises:
        CheckpointError: it is of another kind, incomplete, or has unsupported parts.
    """
    fields = {key: value for key, value in rope_scaling.items() if value is not None}
    is_yarn = fields.pop("rope_type", None) == "yarn"
    complete = {"factor", "original_max_position_embeddings"} <= fields.keys()
    # transformers differs from DeepSeek if only one mscale is given.
    both_or_none = bool(fields.get("mscale")) == bool(fields.get("mscale_all_dim"))
    if not is_yarn or not complete or not both_or_none or fields.keys() - _HF_NAMES.keys():
        raise unsupported("rope_scaling", rope_scaling)
    require_numbers("rope_scaling", fields, *(_HF_NAMES.keys() - {"truncate"}))
    if type(fields.get("truncate", True)) is not bool:
        raise unsupported("rope_scaling", rope_scaling)
    if not fields.get("mscale"):
        fields = {key: value for key, value in fields.items() if not key.startswith("mscale")}
    return YarnScaling(**{_HF_NAMES[key]: value for key, value in fields.items()})


def yarn_to_hf(scaling: YarnScaling) -> dict[str, Any]:
    """Return the field `rope_scaling` of a `config.json`."""
    fields = {theirs: getattr(scaling, ours) for theirs, ours in _HF_NAMES.items()}
    if not scaling.mscale_all_dim:  # programs read a single mscale differently
        del fields["mscale"], fields["mscale_all_dim"]
    return {"rope_type": "yarn"} | fields
