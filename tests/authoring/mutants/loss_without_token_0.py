"""The loss takes token 0 for padding."""

from __future__ import annotations

from mutants import base

from torchtitan.components import build_loss
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("contract.loss",)
SAYS = r"whose label is 0 are never learned.*0 is an ordinary token"


def build(job_config):
    loss_fn = build_loss(job_config)
    return lambda pred, labels: loss_fn(pred, labels.masked_fill(labels == 0, IGNORE_INDEX))


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, build_loss_fn=build)


register_train_spec("loss_without_token_0", get_train_spec)
