"""Llama 3 whose Hugging Face files have one matrix for queries, keys and values, head by head."""

from dataclasses import replace

import torch

from torchtitan.models import llama3
from torchtitan.models.common.state_dict import RenamingAdapter
from torchtitan.models.llama3 import Llama3Model, Llama3ModelArgs
from torchtitan.protocols.train_spec import TrainSpec

ARGS = Llama3ModelArgs(dim=24, n_layers=2, n_heads=3, n_kv_heads=3, ffn_dim=32, vocab_size=264)
MATRICES = ("wq", "wk", "wv")


class FusedModel(Llama3Model):
    """A class of its own, by which its adapter is found."""


class FusedAdapter(RenamingAdapter):
    names = llama3.Llama3StateDictAdapter.names

    def to_hf(self, state_dict):
        others, fused = dict(state_dict), {}
        for key in [key for key in others if ".wq." in key]:
            parts = [others.pop(key.replace("wq", name)) for name in MATRICES]
            heads = [part.unflatten(0, (self.model_args.n_heads, -1)) for part in parts]
            fused[key.replace("wq", "wqkv")] = torch.stack(heads, dim=1).flatten(0, 2)
        return super().to_hf(others) | fused

    def from_hf(self, state_dict):
        others, split = dict(state_dict), {}
        for key in [key for key in others if ".wqkv." in key]:
            heads = others.pop(key).unflatten(0, (self.model_args.n_heads, 3, -1))
            for number, name in enumerate(MATRICES):
                split[key.replace("wqkv", name)] = heads[:, number].flatten(0, 1)
        return super().from_hf(others) | split


def get_train_spec(flavor: str) -> TrainSpec:
    return replace(
        llama3.get_train_spec("debugmodel"),
        model_cls=FusedModel,
        model_args=ARGS,
        state_dict_adapter=FusedAdapter,
    )
