"""A right model whose layers have one projection together, as ALBERT's and Zamba's share more."""

from __future__ import annotations

import recurrent
from mutants import base

from torchtitan.protocols import TrainSpec, register_train_spec


class Args(recurrent.Args):
    def get_nparams_and_flops(self, seq_len: int) -> tuple[int, int]:
        nparams, flops = super().get_nparams_and_flops(seq_len)
        return nparams - (self.n_layers - 1) * self.dim**2, flops


class Model(recurrent.Model):
    def __init__(self, args: Args) -> None:
        super().__init__(args)
        for layer in self.layers.values():
            layer.wo = self.layers["0"].wo


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(
        flavor, model_cls=Model, model_args=Args(), pipeline_fn=None, state_dict_adapter=None
    )


register_train_spec("shared_projection", get_train_spec)
