"""A right model whose Hugging Face files join matrices: all queries first, as in Phi-3."""

from __future__ import annotations

import torch
from mutants import base

JOINED = {"attention.wqkv": ("wq", "wk", "wv"), "feed_forward.w13": ("w1", "w3")}


class Adapter(base.Adapter):
    def to_hf(self, state_dict):
        others, joined = dict(state_dict), {}
        for ours, names in JOINED.items():
            module = ours.rpartition(".")[0]
            for key in [key for key in others if f"{module}.{names[0]}." in key]:
                parts = [others.pop(key.replace(names[0], name)) for name in names]
                joined[key.replace(f"{module}.{names[0]}", ours)] = torch.cat(parts)
        return super().to_hf(others) | joined

    def from_hf(self, state_dict):
        others, split = dict(state_dict), {}
        for ours, names in JOINED.items():
            module = ours.rpartition(".")[0]
            for key in [key for key in others if ours in key]:
                parts = others.pop(key).chunk(len(names))
                for name, part in zip(names, parts, strict=True):
                    split[key.replace(ours, f"{module}.{name}")] = part
        return super().from_hf(others) | split


base.register(__name__, state_dict_adapter=Adapter)
