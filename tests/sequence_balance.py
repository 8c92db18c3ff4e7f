"""DeepSeek-V3's debug model, whose experts are also balanced within each sequence, by a loss that
is heavy, so that an error in it shows.

`--job.custom_import sequence_balance`
"""

from dataclasses import replace

from torchtitan.models import deepseek_v3
from torchtitan.protocols import TrainSpec, register_train_spec

_DEBUG = deepseek_v3.MODEL_CONFIGS["debugmodel"]
_MOE = replace(_DEBUG.moe, aux_loss_weight=0.5, aux_loss_per_sequence=True)
MODEL_CONFIGS = {"tiny": replace(_DEBUG, moe=_MOE)}


def get_train_spec(flavor: str) -> TrainSpec:
    return replace(deepseek_v3.get_train_spec("debugmodel"), model_args=MODEL_CONFIGS[flavor])


register_train_spec("sequence_balance", get_train_spec)

OPTIONS = (
    *("--job.custom_import=sequence_balance", "--model.name=sequence_balance"),
    "--model.flavor=tiny",
)
