"""The adapter leaves out the norm before the feed-forward layer."""

from __future__ import annotations

from mutants import base

CAUGHT_BY = ("adapter.round_trip",)
SAYS = r"layers\.0\.ffn_norm\.weight"


class Adapter(base.Adapter):
    def to_hf(self, state_dict):
        return super().to_hf({k: v for k, v in state_dict.items() if "ffn_norm" not in k})


base.register(__name__, state_dict_adapter=Adapter)
