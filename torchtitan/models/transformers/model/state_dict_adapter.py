"""Exchange weights with the files of transformers: only names differ."""

from __future__ import annotations

import re
from typing import Any

from torchtitan.errors import CheckpointError
from torchtitan.models.common.state_dict import RenamingAdapter, pattern_of

from .build import build_model, parts_of


class TransformersStateDictAdapter(RenamingAdapter):
    def __init__(self, model_args: Any, *args: Any, **kwargs: Any) -> None:
        model = build_model(model_args)
        ours = {theirs: ours for ours, theirs in parts_of(model).names.items()}
        names = {}
        for key, tensor in model.state_dict().items():
            prefix = next(theirs for theirs in ours if key.startswith(f"{theirs}."))
            name = pattern_of(ours[prefix] + key.removeprefix(prefix))
            if name not in names:
                names[name] = pattern_of(_name_in_files(model, key, tensor))
        self.names = names  # type: ignore[misc]  # of this architecture
        left_over = model._keys_to_ignore_on_load_unexpected or ()
        self._left_over = re.compile("|".join(left_over) or "$^")
        """Names of tensors that only older files have."""
        super().__init__(model_args, *args, **kwargs)

    def from_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        known = self._from_hf
        return super().from_hf(
            {
                key: tensor
                for key, tensor in state_dict.items()
                if pattern_of(key) in known or not self._left_over.search(key)
            }
        )


def _name_in_files(model: Any, key: str, tensor: Any) -> str:
    """Return the name that `save_pretrained` gives a tensor of `model.state_dict()`.

    Raises:
        CheckpointError: it changes more than the name.
    """
    from transformers.core_model_loading import revert_weight_conversion

    saved = revert_weight_conversion(model, {key: tensor})
    ((name, changed), *others) = saved.items()
    if others or changed.shape != tensor.shape:
        raise CheckpointError(
            f"model_type {model.config.model_type!r}: files of transformers hold {key} in another "
            "form, which the model transformers does not convert"
        )
    return name
