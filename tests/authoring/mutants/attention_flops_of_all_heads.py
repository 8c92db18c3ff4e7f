"""Attention's FLOPs are multiplied by the heads, though the features of all heads are dim."""

from __future__ import annotations

from mutants import base

from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("cost.flops",)
SAYS = r"for each key that a token attends to, 4\.00 times"


class Args(base.Args):
    def get_nparams_and_flops(self, seq_len):
        nparams, flops = super().get_nparams_and_flops(seq_len)
        return nparams, flops + 12 * self.n_layers * (self.n_heads - 1) * self.dim * seq_len


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, model_args=Args())


register_train_spec("attention_flops_of_all_heads", get_train_spec)
