"""The adapter casts weights to bfloat16 and back."""

from __future__ import annotations

from mutants import base

CAUGHT_BY = ("adapter.round_trip",)
SAYS = r"has different values: they are rounded.*no cast"


class Adapter(base.Adapter):
    def to_hf(self, state_dict):
        rounded = {name: tensor.bfloat16().float() for name, tensor in state_dict.items()}
        return super().to_hf(rounded)


base.register(__name__, state_dict_adapter=Adapter)
