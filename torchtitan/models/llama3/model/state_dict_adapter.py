"""Exchange of Llama 3 weights with Hugging Face's `LlamaForCausalLM`.

Tensors keep their shapes and rows (see `models/common/rope.py` for why): only names change.

Tied weights: our state dicts hold the one tensor under both names, `tok_embeddings.weight` and
`output.weight`, as `nn.Module.state_dict` does, so that every part of a model finds its own names
in a checkpoint. Hugging Face's hold it under `model.embed_tokens.weight` alone.
"""

from __future__ import annotations

from typing import Any

from torchtitan.models.common.state_dict import rename
from torchtitan.protocols.state_dict_adapter import BaseStateDictAdapter

_TO_HF = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "layers.{}.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
    "layers.{}.attention.wq.weight": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.attention.wk.weight": "model.layers.{}.self_attn.k_proj.weight",
    "layers.{}.attention.wv.weight": "model.layers.{}.self_attn.v_proj.weight",
    "layers.{}.attention.wo.weight": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.feed_forward.w1.weight": "model.layers.{}.mlp.gate_proj.weight",
    "layers.{}.feed_forward.w2.weight": "model.layers.{}.mlp.down_proj.weight",
    "layers.{}.feed_forward.w3.weight": "model.layers.{}.mlp.up_proj.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_FROM_HF = {hf_name: name for name, hf_name in _TO_HF.items()}


class Llama3StateDictAdapter(BaseStateDictAdapter):
    """Both directions raise `CheckpointError` for a name that is not Llama 3's."""

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        names = _TO_HF
        if self.model_args.tie_word_embeddings:
            names = names | {"output.weight": "model.embed_tokens.weight"}
        return {rename(key, names): value for key, value in state_dict.items()}

    def from_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        tied = self.model_args.tie_word_embeddings
        converted = {}
        for key, value in state_dict.items():
            if key.endswith(".rotary_emb.inv_freq"):
                continue  # older files hold what rope_theta already says
            if tied and key == "lm_head.weight":
                continue  # a copy of the embedding, which some files hold
            converted[rename(key, _FROM_HF)] = value
        if tied and "tok_embeddings.weight" in converted:
            converted["output.weight"] = converted["tok_embeddings.weight"]
        return converted
