"""The adapter casts weights to bfloat16 and back."""

from __future__ import annotations

from mutants import base

from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("adapter.round_trip",)
SAYS = r"has different values: they are rounded.*no cast"


class Adapter(base.Adapter):
    def to_hf(self, state_dict):
        rounded = {name: tensor.bfloat16().float() for name, tensor in state_dict.items()}
        return super().to_hf(rounded)


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, state_dict_adapter=Adapter)


register_train_spec("adapter_rounds", get_train_spec)
