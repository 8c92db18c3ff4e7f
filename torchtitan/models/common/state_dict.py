"""Renaming the tensors of a checkpoint by a table."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torchtitan.errors import CheckpointError, did_you_mean

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def rename(key: str, names: Mapping[str, str]) -> str:
    """The new name of tensor `key`, e.g. `layers.3.norm.weight`.

    `names` maps old names to new ones, with `{}` for a layer's number on both sides.

    Raises:
        CheckpointError: the table has no such name.
    """
    pattern = _NUMBER.sub("{}", key)
    if pattern not in names:
        raise CheckpointError(
            f"checkpoint: tensor {key!r} is not one of this model's.{did_you_mean(pattern, names)}"
        )
    return names[pattern].format(*_NUMBER.findall(key))
