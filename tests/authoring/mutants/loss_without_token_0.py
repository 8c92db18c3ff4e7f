"""The loss takes token 0 for padding."""

from __future__ import annotations

from mutants import base

from torchtitan.components import build_loss
from torchtitan.components.loss import IGNORE_INDEX

CAUGHT_BY = ("contract.loss",)
SAYS = r"whose label is 0 are never learned.*0 is an ordinary token"


def build(job_config):
    loss_fn = build_loss(job_config)
    return lambda pred, labels: loss_fn(pred, labels.masked_fill(labels == 0, IGNORE_INDEX))


base.register(__name__, build_loss_fn=build)
