"""The adapter counts on the embedding's being there, which a pipeline stage may not have."""

from __future__ import annotations

from mutants import base

from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("adapter.parts",)
SAYS = r"with the names of layers\.0 alone, to_hf\(\) fails: KeyError"


class Adapter(base.Adapter):
    def to_hf(self, state_dict):
        state_dict["tok_embeddings.weight"]
        return super().to_hf(state_dict)


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, state_dict_adapter=Adapter)


register_train_spec("adapter_needs_all_names", get_train_spec)
