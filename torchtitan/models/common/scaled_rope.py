"""Rotary positions with any kind of scaling for long contexts that a model may be given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .hf_config import require_numbers, unsupported
from .rope import (
    RopeScaling,
    Rotation,
    rope_frequencies,
    rope_scaling_from_hf,
    rope_scaling_to_hf,
    rotation,
)
from .yarn import YarnScaling, yarn_frequencies, yarn_from_hf, yarn_to_hf


@dataclass(frozen=True)
class LinearScaling:
    """Makes all rotations slower by `factor` (position interpolation, arXiv:2306.15595)."""

    factor: float


AnyScaling = RopeScaling | YarnScaling | LinearScaling


def scaled_rotation(
    positions: torch.Tensor, head_dim: int, theta: float, scaling: AnyScaling | None
) -> Rotation:
    """Return the rotation of `positions` `[batch or 1, seq]`, by halves."""
    device = positions.device
    if isinstance(scaling, YarnScaling):
        frequencies = yarn_frequencies(head_dim, theta, scaling, device)
        return rotation(positions, frequencies, factor=scaling.rotation_factor)
    if isinstance(scaling, LinearScaling):
        return rotation(
            positions, rope_frequencies(head_dim, theta, device=device) / scaling.factor
        )
    return rotation(positions, rope_frequencies(head_dim, theta, scaling, device))


def scaling_from_hf(rope_scaling: dict[str, Any] | None) -> AnyScaling | None:
    """Read the `rope_scaling` of a `config.json`, as `HuggingFaceConfig.take_rope` returns it.

    Raises:
        CheckpointError: it is of another kind, incomplete, or has unsupported parts.
    """
    if rope_scaling is None:
        return None
    kind = rope_scaling["rope_type"]
    if kind == "yarn":
        return yarn_from_hf(rope_scaling)
    if kind != "linear":
        return rope_scaling_from_hf(rope_scaling)
    if rope_scaling.keys() != {"rope_type", "factor"}:
        raise unsupported("rope_scaling", rope_scaling)
    require_numbers("rope_scaling", rope_scaling, "factor")
    return LinearScaling(rope_scaling["factor"])


def scaling_to_hf(scaling: AnyScaling | None) -> dict[str, Any] | None:
    """Return the field `rope_scaling` of a `config.json`."""
    if isinstance(scaling, YarnScaling):
        return yarn_to_hf(scaling)
    if isinstance(scaling, LinearScaling):
        return {"rope_type": "linear", "factor": scaling.factor}
    return rope_scaling_to_hf(scaling)
