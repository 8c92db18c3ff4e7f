"""Exchange weights with the files of transformers: only the outer names differ."""

from __future__ import annotations

from typing import Any

from torchtitan.models.common.state_dict import RenamingAdapter, pattern_of

from .build import build_model, parts_of


class TransformersStateDictAdapter(RenamingAdapter):
    def __init__(self, model_args: Any, *args: Any, **kwargs: Any) -> None:
        model = build_model(model_args)
        ours = {theirs: ours for ours, theirs in parts_of(model).names.items()}
        names = {}
        for key in model.state_dict():
            prefix = next(theirs for theirs in ours if key.startswith(f"{theirs}."))
            names[pattern_of(ours[prefix] + key.removeprefix(prefix))] = pattern_of(key)
        self.names = names  # type: ignore[misc]  # of this architecture
        super().__init__(model_args, *args, **kwargs)
