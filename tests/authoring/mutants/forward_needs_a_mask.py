"""forward has a second argument without a default."""

from __future__ import annotations

from mutants import base

from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("contract.signatures",)
SAYS = r"Model\.forward.* cannot be called .*missing a required argument: 'mask'"


class Model(base.Model):
    def forward(self, tokens, mask):
        return super().forward(tokens)


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, model_cls=Model)


register_train_spec("forward_needs_a_mask", get_train_spec)
