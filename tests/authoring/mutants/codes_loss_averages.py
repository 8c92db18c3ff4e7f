"""The loss is a mean over codes that count, though the trainer divides by them again."""

from __future__ import annotations

from dataclasses import replace

import tiny_own_batches as own

from torchtitan.components.loss import count_labels
from torchtitan.protocols import register_train_spec

CAUGHT_BY = ("contract.loss", "layouts.accumulation")
SAYS = r"the loss of two rows is"


def mean(pred, labels):
    return own.cross_entropy(pred, labels) / count_labels(labels).clamp(min=1)


register_train_spec(
    "codes_loss_averages", lambda flavor: replace(own.codes(), build_loss_fn=lambda config: mean)
)
