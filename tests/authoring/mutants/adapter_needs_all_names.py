"""The adapter counts on the embedding's being there, which a pipeline stage may not have."""

from __future__ import annotations

from mutants import base

CAUGHT_BY = ("adapter.parts",)
SAYS = r"with the names of layers\.0 alone, to_hf\(\) fails: KeyError.* \(.*_all_names\.py:\d+\)"


class Adapter(base.Adapter):
    def to_hf(self, state_dict):
        state_dict["tok_embeddings.weight"]
        return super().to_hf(state_dict)


base.register(__name__, state_dict_adapter=Adapter)
