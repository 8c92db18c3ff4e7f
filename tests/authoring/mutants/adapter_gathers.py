"""The adapter makes sharded tensors whole on every rank."""

from __future__ import annotations

from mutants import base

CAUGHT_BY = ("adapter.dtensor",)
SAYS = r"bytes on a rank that holds"


class Adapter(base.Adapter):
    def to_hf(self, state_dict):
        hf = super().to_hf(state_dict)
        return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in hf.items()}


base.register(__name__, state_dict_adapter=Adapter)
