"""The loss is the mean over the valid tokens, times the number of all."""

from __future__ import annotations

import torch.nn.functional as F
from mutants import base
from torch.distributed.tensor import DTensor

CAUGHT_BY = (
    "layouts.fsdp2",
    "layouts.ddp2",
    "layouts.cp2",
    "layouts.pp2",
    "layouts.accumulation",
    "contract.loss",
)
SAYS = r"outputs agree, but the loss of step 1 is off by .* the sum, not the mean, over"


class Mean:
    def attach(self, model_parts):
        pass

    def __call__(self, pred, labels):
        if isinstance(pred, DTensor):
            pred = pred.full_tensor()
        return F.cross_entropy(pred.flatten(0, 1).float(), labels.flatten()) * labels.numel()


def build_mean(job_config):
    return Mean()


base.register(__name__, build_loss_fn=build_mean)
