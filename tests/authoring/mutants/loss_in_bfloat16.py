"""The loss is computed in the dtype of the logits, which is bfloat16 in most jobs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mutants import base

from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.config import JobConfig

CAUGHT_BY = ("numerics.dtype",)
SAYS = r"with weights in torch\.bfloat16, the loss is torch\.bfloat16"


def summed(pred: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    flat = pred.flatten(0, 1), labels.flatten()
    return F.cross_entropy(*flat, ignore_index=IGNORE_INDEX, reduction="sum")


def build_loss(job_config: JobConfig):
    return summed


base.register(__name__, build_loss_fn=build_loss)
