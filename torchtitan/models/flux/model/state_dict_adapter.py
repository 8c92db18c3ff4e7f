"""Exchange FLUX.1 weights with diffusers' `FluxTransformer2DModel`.

Its files count double and single blocks from 0 each. Names change, and a single block's `wo` and
`w2` are columns of one matrix there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from torchtitan.errors import CheckpointError, did_you_mean
from torchtitan.protocols.state_dict_adapter import BaseStateDictAdapter

from .args import FluxModelArgs

DOUBLE = {
    "image.modulation": "norm1.linear",
    "image.heads.wq": "attn.to_q",
    "image.heads.wk": "attn.to_k",
    "image.heads.wv": "attn.to_v",
    "image.heads.q_norm": "attn.norm_q",
    "image.heads.k_norm": "attn.norm_k",
    "image.wo": "attn.to_out.0",
    "image.w1": "ff.net.0.proj",
    "image.w2": "ff.net.2",
    "text.modulation": "norm1_context.linear",
    "text.heads.wq": "attn.add_q_proj",
    "text.heads.wk": "attn.add_k_proj",
    "text.heads.wv": "attn.add_v_proj",
    "text.heads.q_norm": "attn.norm_added_q",
    "text.heads.k_norm": "attn.norm_added_k",
    "text.wo": "attn.to_add_out",
    "text.w1": "ff_context.net.0.proj",
    "text.w2": "ff_context.net.2",
}
SINGLE = {
    "modulation": "norm.linear",
    "heads.wq": "attn.to_q",
    "heads.wk": "attn.to_k",
    "heads.wv": "attn.to_v",
    "heads.q_norm": "attn.norm_q",
    "heads.k_norm": "attn.norm_k",
    "w1": "proj_mlp",
    "wo": "proj_out",  # a part of its weight
    "w2": "proj_out",  # the other, and its bias; from_hf finds this name
}
OTHERS = {
    "image_in": "x_embedder",
    "text_in": "context_embedder",
    "condition.time.w1": "time_text_embed.timestep_embedder.linear_1",
    "condition.time.w2": "time_text_embed.timestep_embedder.linear_2",
    "condition.guidance.w1": "time_text_embed.guidance_embedder.linear_1",
    "condition.guidance.w2": "time_text_embed.guidance_embedder.linear_2",
    "condition.pooled.w1": "time_text_embed.text_embedder.linear_1",
    "condition.pooled.w2": "time_text_embed.text_embedder.linear_2",
    "output.modulation": "norm_out.linear",
    "output.linear": "proj_out",
}


class FluxStateDictAdapter(BaseStateDictAdapter):
    model_args: FluxModelArgs

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._to_hf, first = dict(OTHERS), 0
        for stack, names, count in (
            ("transformer_blocks", DOUBLE, self.model_args.n_double_layers),
            ("single_transformer_blocks", SINGLE, self.model_args.n_single_layers),
        ):
            for i in range(count):
                for ours, theirs in names.items():
                    self._to_hf[f"layers.{first + i}.{ours}"] = f"{stack}.{i}.{theirs}"
            first += count
        self._from_hf = {theirs: ours for ours, theirs in self._to_hf.items()}

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        converted = {}
        for key, tensor in state_dict.items():
            theirs = _renamed(key, self._to_hf)
            if _is_joined(theirs):
                if key.endswith(".w2.weight"):
                    continue  # joined to `wo`
                tensor = torch.cat([tensor, state_dict[key.replace(".wo.", ".w2.")]], dim=1)
            converted[theirs] = tensor
        return converted

    def from_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        converted = {}
        for key, tensor in state_dict.items():
            ours = _renamed(key, self._from_hf)
            if _is_joined(key):
                dim = tensor.shape[0]
                converted[ours.replace(".w2.", ".wo.")] = tensor[:, :dim]
                tensor = tensor[:, dim:]
            converted[ours] = tensor
        return converted


def _is_joined(theirs: str) -> bool:
    return theirs.startswith("single_") and theirs.endswith(".proj_out.weight")


def _renamed(key: str, modules: Mapping[str, str]) -> str:
    """Return the new name of a tensor. Raise `CheckpointError` if it is of none of `modules`."""
    module, _, kind = key.rpartition(".")
    if module not in modules:
        raise CheckpointError(
            f"checkpoint: tensor {key!r} is not one of flux.{did_you_mean(module, modules)}"
        )
    return f"{modules[module]}.{kind}"
