"""Qwen3's debug model of experts, with a z-loss that is heavy, so that an error in it shows.

`--job.custom_import z_loss_qwen3`
"""

from dataclasses import replace

from torchtitan.models import qwen3
from torchtitan.protocols import TrainSpec, register_train_spec

_DEBUG = qwen3.MODEL_CONFIGS["debugmodel_moe"]
MODEL_CONFIGS = {"tiny": replace(_DEBUG, moe=replace(_DEBUG.moe, z_loss_weight=0.1))}


def get_train_spec(flavor: str) -> TrainSpec:
    return replace(qwen3.get_train_spec("debugmodel_moe"), model_args=MODEL_CONFIGS[flavor])


register_train_spec("z_loss_qwen3", get_train_spec)

OPTIONS = ("--job.custom_import=z_loss_qwen3", "--model.name=z_loss_qwen3", "--model.flavor=tiny")
