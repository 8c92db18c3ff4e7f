"""Multiplications and additions are counted twice."""

from __future__ import annotations

from mutants import base

from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("cost.flops",)
SAYS = r"2\.00 times.*already 2 FLOPs"


class Args(base.Args):
    def get_nparams_and_flops(self, seq_len):
        nparams, flops = super().get_nparams_and_flops(seq_len)
        return nparams, 2 * flops


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, model_args=Args())


register_train_spec("flops_off_by_two", get_train_spec)
