"""The specs of mutants that predict several tokens: DeepSeek-V3's, with another model."""

from __future__ import annotations

from dataclasses import replace

from torchtitan.models.deepseek_v3 import DeepSeekV3Model
from torchtitan.models.deepseek_v3 import get_train_spec as right_spec
from torchtitan.protocols import register_train_spec


def register(name: str, model_cls: type[DeepSeekV3Model]) -> None:
    register_train_spec(
        name, lambda flavor: replace(right_spec("debugmodel_mtp"), model_cls=model_cls)
    )
