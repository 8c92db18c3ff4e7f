"""The FLOPs of a mixture of experts are those of all experts, not of those that a token uses."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torchtitan.models import qwen3
from torchtitan.models.qwen3 import Qwen3ModelArgs
from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("cost.flops",)
SAYS = r"\d\.\d\d times.*only the experts that a token uses"


@dataclass
class Args(Qwen3ModelArgs):
    def get_nparams_and_flops(self, seq_len):
        nparams, _ = super().get_nparams_and_flops(seq_len)
        attention = 12 * self.n_layers * self.n_heads * self.head_dim * seq_len
        return nparams, 6 * nparams + attention


ARGS = Args(**vars(qwen3.MODEL_CONFIGS["debugmodel_moe"]))


def get_train_spec(flavor: str) -> TrainSpec:
    return replace(qwen3.get_train_spec("debugmodel_moe"), model_args=ARGS)


register_train_spec("all_experts_counted", get_train_spec)
