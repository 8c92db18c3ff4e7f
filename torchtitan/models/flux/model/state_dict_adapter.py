"""Exchange FLUX.1 weights with diffusers' `FluxTransformer2DModel`.

Its files count double and single blocks from 0 each. Names change, and a single block's `wo` and
`w2` are columns of one matrix there.
"""

from __future__ import annotations

from typing import Any

import torch

from torchtitan.errors import CheckpointError, did_you_mean
from torchtitan.protocols.state_dict_adapter import BaseStateDictAdapter

from .args import FluxModelArgs

DOUBLE, SINGLE = "transformer_blocks.", "single_transformer_blocks."
JOINED = SINGLE + "{}.proj_out.weight"
_LINEARS = {
    "image_in": "x_embedder",
    "text_in": "context_embedder",
    "condition.time.w1": "time_text_embed.timestep_embedder.linear_1",
    "condition.time.w2": "time_text_embed.timestep_embedder.linear_2",
    "condition.guidance.w1": "time_text_embed.guidance_embedder.linear_1",
    "condition.guidance.w2": "time_text_embed.guidance_embedder.linear_2",
    "condition.pooled.w1": "time_text_embed.text_embedder.linear_1",
    "condition.pooled.w2": "time_text_embed.text_embedder.linear_2",
    "layers.{}.image.modulation": DOUBLE + "{}.norm1.linear",
    "layers.{}.image.heads.wq": DOUBLE + "{}.attn.to_q",
    "layers.{}.image.heads.wk": DOUBLE + "{}.attn.to_k",
    "layers.{}.image.heads.wv": DOUBLE + "{}.attn.to_v",
    "layers.{}.image.wo": DOUBLE + "{}.attn.to_out.0",
    "layers.{}.image.w1": DOUBLE + "{}.ff.net.0.proj",
    "layers.{}.image.w2": DOUBLE + "{}.ff.net.2",
    "layers.{}.text.modulation": DOUBLE + "{}.norm1_context.linear",
    "layers.{}.text.heads.wq": DOUBLE + "{}.attn.add_q_proj",
    "layers.{}.text.heads.wk": DOUBLE + "{}.attn.add_k_proj",
    "layers.{}.text.heads.wv": DOUBLE + "{}.attn.add_v_proj",
    "layers.{}.text.wo": DOUBLE + "{}.attn.to_add_out",
    "layers.{}.text.w1": DOUBLE + "{}.ff_context.net.0.proj",
    "layers.{}.text.w2": DOUBLE + "{}.ff_context.net.2",
    "layers.{}.modulation": SINGLE + "{}.norm.linear",
    "layers.{}.heads.wq": SINGLE + "{}.attn.to_q",
    "layers.{}.heads.wk": SINGLE + "{}.attn.to_k",
    "layers.{}.heads.wv": SINGLE + "{}.attn.to_v",
    "layers.{}.w1": SINGLE + "{}.proj_mlp",
    "output.modulation": "norm_out.linear",
    "output.linear": "proj_out",
}
_NORMS = {
    "layers.{}.image.heads.q_norm.weight": DOUBLE + "{}.attn.norm_q.weight",
    "layers.{}.image.heads.k_norm.weight": DOUBLE + "{}.attn.norm_k.weight",
    "layers.{}.text.heads.q_norm.weight": DOUBLE + "{}.attn.norm_added_q.weight",
    "layers.{}.text.heads.k_norm.weight": DOUBLE + "{}.attn.norm_added_k.weight",
    "layers.{}.heads.q_norm.weight": SINGLE + "{}.attn.norm_q.weight",
    "layers.{}.heads.k_norm.weight": SINGLE + "{}.attn.norm_k.weight",
}
TO_HF = {
    f"{ours}.{kind}": f"{theirs}.{kind}"
    for ours, theirs in _LINEARS.items()
    for kind in ("weight", "bias")
} | {**_NORMS, "layers.{}.wo.weight": JOINED, "layers.{}.w2.bias": SINGLE + "{}.proj_out.bias"}
FROM_HF = {theirs: ours for ours, theirs in TO_HF.items()}


class FluxStateDictAdapter(BaseStateDictAdapter):
    model_args: FluxModelArgs

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        converted = {}
        for key, tensor in state_dict.items():
            pattern, number = _pattern(key)
            if pattern == "layers.{}.w2.weight":
                continue  # joined to `wo`
            if pattern == "layers.{}.wo.weight":
                tensor = torch.cat([tensor, state_dict[key.replace(".wo.", ".w2.")]], dim=1)
            theirs = _look_up(pattern, TO_HF)
            if theirs.startswith(SINGLE):
                number -= self.model_args.n_double_layers
            converted[theirs.format(number)] = tensor
        return converted

    def from_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        converted = {}
        for key, tensor in state_dict.items():
            pattern, number = _pattern(key)
            if pattern.startswith(SINGLE):
                number += self.model_args.n_double_layers
            ours = _look_up(pattern, FROM_HF).format(number)
            if pattern == JOINED:
                dim = tensor.shape[0]
                converted[ours.replace(".wo.", ".w2.")] = tensor[:, dim:]
                tensor = tensor[:, :dim]
            converted[ours] = tensor
        return converted


def _pattern(key: str) -> tuple[str, int]:
    """Return a name with `{}` for the number of its block, and this number; 0 if it has none."""
    stack, *rest = key.split(".")
    if not rest[0].isdecimal():
        return key, 0
    return ".".join([stack, "{}", *rest[1:]]), int(rest[0])


def _look_up(pattern: str, names: dict[str, str]) -> str:
    """Return the new name of `pattern`. Raise `CheckpointError` if there is none."""
    if pattern not in names:
        raise CheckpointError(
            f"checkpoint: tensor {pattern!r} is not one of flux.{did_you_mean(pattern, names)}"
        )
    return names[pattern]
