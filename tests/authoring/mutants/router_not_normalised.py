"""The weights of a token's experts do not add up to 1, though the checkpoint's do."""

from __future__ import annotations

from dataclasses import replace

from torchtitan.models import qwen3
from torchtitan.models.qwen3 import Qwen3Model
from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("adapter.hf_numbers",)
SAYS = r"layers\.0 is the first layer that differs.*router"
HF_CONFIG = {
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "vocab_size": 264,
}


class Model(Qwen3Model):
    def __init__(self, args):
        not_normalised = replace(args.moe, normalize_weights=False)
        super().__init__(replace(args, moe=not_normalised))
        self.args = args


def get_train_spec(flavor: str) -> TrainSpec:
    return replace(qwen3.get_train_spec("debugmodel_moe"), model_cls=Model)


register_train_spec("router_not_normalised", get_train_spec)
