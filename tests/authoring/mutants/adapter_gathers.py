"""The adapter makes sharded tensors whole on every rank."""

from __future__ import annotations

from mutants import base

from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("adapter.dtensor",)
SAYS = r"bytes on a rank that holds"


class Adapter(base.Adapter):
    def to_hf(self, state_dict):
        hf = super().to_hf(state_dict)
        return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in hf.items()}


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, state_dict_adapter=Adapter)


register_train_spec("adapter_gathers", get_train_spec)
