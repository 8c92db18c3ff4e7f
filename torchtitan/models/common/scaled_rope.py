"""Rotary positions with any kind of scaling for long contexts that a model may be given."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, get_type_hints

import torch

from .hf_config import require_in_range, require_numbers, unsupported
from .ranges import PositiveFloat
from .rope import RopeScaling, Rotation, rope_frequencies, rotation
from .yarn import YarnScaling


@dataclass(frozen=True)
class LinearScaling:
    """Makes all rotations slower by `factor` (position interpolation, arXiv:2306.15595)."""

    rope_type: ClassVar[str] = "linear"
    rotation_factor: ClassVar[float] = 1.0

    factor: PositiveFloat

    def frequencies(
        self, head_dim: int, theta: float, device: torch.device | None = None
    ) -> torch.Tensor:
        """Return the scaled `rope_frequencies`."""
        return rope_frequencies(head_dim, theta, device) / self.factor


AnyScaling = RopeScaling | YarnScaling | LinearScaling
_KINDS: dict[str, Any] = {
    kind.rope_type: kind for kind in (RopeScaling, YarnScaling, LinearScaling)
}
_THEIR_NAMES = {"original_max_seq_len": "original_max_position_embeddings"}
"""Our name of a field -> that in a `config.json`, where they differ."""
_OPTIONAL = {"beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}


def scaled_rotation(
    positions: torch.Tensor,
    head_dim: int,
    theta: float,
    scaling: AnyScaling | None,
    interleaved: bool = False,
) -> Rotation:
    """Return the rotation of `positions` `[batch or 1, seq]`; `interleaved`: see `Rotation`."""
    if scaling is None:
        frequencies = rope_frequencies(head_dim, theta, positions.device)
        return rotation(positions, frequencies, interleaved)
    frequencies = scaling.frequencies(head_dim, theta, positions.device)
    return rotation(positions, frequencies, interleaved, scaling.rotation_factor)


def scaling_from_hf(rope_scaling: dict[str, Any] | None, *kinds: type) -> Any:
    """Read the `rope_scaling` of a `config.json`, as `HuggingFaceConfig.take_rope` returns it.

    Args:
        kinds: the classes that the model supports; none: all.

    Raises:
        CheckpointError: it is of another kind, incomplete, or has unsupported parts, or a number
            is out of range.
        ValueError: the numbers do not fit together.
    """
    if rope_scaling is None:
        return None
    values = dict(rope_scaling)
    kind: Any = _KINDS.get(str(values.pop("rope_type", None)))
    if kind not in (kinds or _KINDS.values()):
        raise unsupported("rope_scaling", rope_scaling)
    if kind is YarnScaling:  # null stands for the default, as does 0 for mscale
        values = {
            key: value
            for key, value in values.items()
            if value is not None and (value or not key.startswith("mscale"))
        }
    ours = {_THEIR_NAMES.get(field.name, field.name): field.name for field in fields(kind)}
    complete = ours.keys() - _OPTIONAL <= values.keys() <= ours.keys()
    # transformers differs from DeepSeek if only one mscale is given.
    both_or_none = ("mscale" in values) == ("mscale_all_dim" in values)
    if not complete or not both_or_none or type(values.get("truncate", True)) is not bool:
        raise unsupported("rope_scaling", rope_scaling)
    require_numbers("rope_scaling", values, *(values.keys() - {"truncate"}))
    hints = get_type_hints(kind, include_extras=True)
    for key, value in values.items():
        require_in_range(f"rope_scaling: {key}", value, hints[ours[key]])
    return kind(**{ours[key]: value for key, value in values.items()})


def scaling_to_hf(scaling: AnyScaling | None) -> dict[str, Any] | None:
    """Return the field `rope_scaling` of a `config.json`."""
    if scaling is None:
        return None
    values = {_THEIR_NAMES.get(name, name): value for name, value in asdict(scaling).items()}
    if not values.get("mscale_all_dim"):  # programs read a single mscale differently
        values.pop("mscale", None)
        values.pop("mscale_all_dim", None)
    return {"rope_type": scaling.rope_type} | values
