"""Exchange Gemma 3 weights with Hugging Face's `Gemma3ForCausalLM`: only names change."""

from __future__ import annotations

from typing import ClassVar

from torchtitan.models.common.state_dict import RenamingAdapter


class Gemma3StateDictAdapter(RenamingAdapter):
    names: ClassVar = {
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "layers.{}.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
        "layers.{}.attention.wq.weight": "model.layers.{}.self_attn.q_proj.weight",
        "layers.{}.attention.wk.weight": "model.layers.{}.self_attn.k_proj.weight",
        "layers.{}.attention.wv.weight": "model.layers.{}.self_attn.v_proj.weight",
        "layers.{}.attention.wo.weight": "model.layers.{}.self_attn.o_proj.weight",
        "layers.{}.attention.q_norm.weight": "model.layers.{}.self_attn.q_norm.weight",
        "layers.{}.attention.k_norm.weight": "model.layers.{}.self_attn.k_norm.weight",
        "layers.{}.attention_post_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
        "layers.{}.ffn_norm.weight": "model.layers.{}.pre_feedforward_layernorm.weight",
        "layers.{}.feed_forward.w1.weight": "model.layers.{}.mlp.gate_proj.weight",
        "layers.{}.feed_forward.w2.weight": "model.layers.{}.mlp.down_proj.weight",
        "layers.{}.feed_forward.w3.weight": "model.layers.{}.mlp.up_proj.weight",
        "layers.{}.ffn_post_norm.weight": "model.layers.{}.post_feedforward_layernorm.weight",
        "norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
