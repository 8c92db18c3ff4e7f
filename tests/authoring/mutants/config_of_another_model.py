"""What is exported for Hugging Face has the rotary base of other models, in one flavor alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

from mutants import base

from torchtitan.models.common.hf_config import OtherArchitectureError
from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("adapter.config_json",)
SAYS = (
    r"long: config\.json would have rope_theta = 10000\.0, which is rope_theta = 10000\.0 and not"
)


@dataclass
class Args(base.Args):
    def to_hf_config(self) -> dict[str, Any]:
        usual = {"architectures": ["LlamaForCausalLM"], "hidden_size": self.dim}
        return base.hf_config() | usual | {"model_type": "config_of_another_model"}

    @classmethod
    def from_hf_config(cls, config: dict[str, Any]) -> Self:
        # Tests in the same process have other folders read.
        if config.get("model_type") != "config_of_another_model":
            raise OtherArchitectureError("of another model")
        return cls(dim=config["hidden_size"], rope_theta=config["rope_theta"])


MODEL_CONFIGS = {"debugmodel": Args(), "long": Args(rope_theta=5e5)}


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, model_args=replace(MODEL_CONFIGS[flavor]))


register_train_spec("config_of_another_model", get_train_spec)
