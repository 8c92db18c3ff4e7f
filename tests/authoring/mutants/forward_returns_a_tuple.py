"""forward returns the logits and a loss of its own."""

from __future__ import annotations

import torch
from mutants import base

from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("contract.forward",)
SAYS = r"returns tuple, not logits"


class Model(base.Model):
    def forward(self, tokens, positions=None, document_ids=None):
        return super().forward(tokens, positions, document_ids), torch.zeros(())


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, model_cls=Model)


register_train_spec("forward_returns_a_tuple", get_train_spec)
