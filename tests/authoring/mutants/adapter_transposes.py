"""The adapter transposes square matrices on the way out alone."""

from __future__ import annotations

from mutants import base

CAUGHT_BY = ("adapter.round_trip",)
SAYS = r"layers\.0\.attention\.wq\.weight has different values: it is transposed"


class Adapter(base.Adapter):
    def to_hf(self, state_dict):
        hf = super().to_hf(state_dict)
        return {k: v.T.contiguous() if "q_proj" in k else v for k, v in hf.items()}


base.register(__name__, state_dict_adapter=Adapter)
