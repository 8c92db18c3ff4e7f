"""The backward pass is not counted."""

from __future__ import annotations

from mutants import base

from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("cost.flops",)
SAYS = r"0\.33 times.*only the forward pass"


class Args(base.Args):
    def get_nparams_and_flops(self, seq_len):
        nparams, flops = super().get_nparams_and_flops(seq_len)
        return nparams, flops // 3


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, model_args=Args())


register_train_spec("flops_of_the_forward_pass", get_train_spec)
