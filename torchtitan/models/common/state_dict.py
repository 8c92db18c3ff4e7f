"""Exchange weights with Hugging Face by a table of names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torchtitan.errors import CheckpointError, did_you_mean
from torchtitan.protocols.state_dict_adapter import BaseStateDictAdapter

from .hf_config import DEQUANTIZE

_OF_QUANTIZED = ("_scale_inv", "_blocks", "_scales")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class RenamingAdapter(BaseStateDictAdapter):
    """For models whose tensors have other names but the same shapes in Hugging Face's files.

    Tied weights: our state dicts hold the one tensor under both names, `tok_embeddings.weight` and
    `output.weight`, as `nn.Module.state_dict` does, so that every part of a model finds its own
    names in a checkpoint. Hugging Face's state dicts hold it only under the embedding's name.

    Both directions raise `CheckpointError` for a name that is not in the table.
    """

    model_args: Any  # may have `tie_word_embeddings`
    names: ClassVar[Mapping[str, str]]
    """Our name -> theirs, with `{}` for a layer's number; see `rename`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tied = getattr(self.model_args, "tie_word_embeddings", False)
        self._from_hf = {theirs: ours for ours, theirs in self.names.items()}
        self._to_hf = dict(self.names)
        if self._tied:
            self._to_hf["output.weight"] = self.names["tok_embeddings.weight"]

    def copies(self) -> dict[str, str]:
        if not self._tied:
            return {}
        return {self.names["output.weight"]: self.names["tok_embeddings.weight"]}

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {rename(key, self._to_hf): value for key, value in state_dict.items()}

    def check_names(self, names: Iterable[str]) -> None:
        for name in names:
            if name.endswith(_OF_QUANTIZED) and pattern_of(name) not in self._from_hf:
                raise CheckpointError(
                    f"checkpoint: tensor {name!r} belongs to a quantized weight, which is not "
                    f"supported. {DEQUANTIZE}"
                )

    def from_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        self.check_names(state_dict)
        converted, copies = {}, self.copies()
        for key, value in state_dict.items():
            if key.endswith(".rotary_emb.inv_freq"):
                continue  # in older files; rope_theta implies it
            if key in copies:
                continue  # in some files
            converted[rename(key, self._from_hf)] = value
        if self._tied and "tok_embeddings.weight" in converted:
            converted["output.weight"] = converted["tok_embeddings.weight"]
        return converted


def rename(key: str, names: Mapping[str, str]) -> str:
    """Return the new name of tensor `key`, e.g. `layers.3.norm.weight`.

    `names` maps old names to new ones, with `{}` for a layer's number on both sides.

    Raises:
        CheckpointError: the table has no such name.
    """
    pattern = pattern_of(key)
    if pattern not in names:
        raise CheckpointError(
            f"checkpoint: tensor {key!r} is not one of this model's.{did_you_mean(pattern, names)}"
        )
    return names[pattern].format(*numbers_of(key))


def pattern_of(key: str) -> str:
    """`layers.3.norm.weight` -> `layers.{}.norm.weight`."""
    return _NUMBER.sub("{}", key)


def numbers_of(key: str) -> list[str]:
    """`layers.3.experts.12.weight` -> `["3", "12"]`."""
    return _NUMBER.findall(key)
