"""The loss shifts labels, which are shifted already, as Hugging Face's models do."""

from __future__ import annotations

import torch.nn.functional as F
from mutants import base

from torchtitan.components.loss import IGNORE_INDEX

CAUGHT_BY = ("contract.loss",)
SAYS = r"the label of the next token.*not pred\[:, :-1\] with labels\[:, 1:\]"


def shifted_cross_entropy(pred, labels):
    return F.cross_entropy(
        pred[:, :-1].flatten(0, 1).float(),
        labels[:, 1:].flatten(),
        reduction="sum",
        ignore_index=IGNORE_INDEX,
    )


def build(job_config):
    return shifted_cross_entropy


base.register(__name__, build_loss_fn=build)
