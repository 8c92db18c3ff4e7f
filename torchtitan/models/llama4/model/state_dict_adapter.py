"""Exchange weights with Hugging Face's `Llama4ForCausalLM`.

Tensors keep their shapes and rows: only names change.
"""

from __future__ import annotations

from typing import ClassVar

from torchtitan.models.common.expert_state_dict import ExpertsAdapter


class Llama4StateDictAdapter(ExpertsAdapter):
    names: ClassVar = {
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "layers.{}.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
        "layers.{}.attention.wq.weight": "model.layers.{}.self_attn.q_proj.weight",
        "layers.{}.attention.wk.weight": "model.layers.{}.self_attn.k_proj.weight",
        "layers.{}.attention.wv.weight": "model.layers.{}.self_attn.v_proj.weight",
        "layers.{}.attention.wo.weight": "model.layers.{}.self_attn.o_proj.weight",
        "layers.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
        "layers.{}.feed_forward.w1.weight": "model.layers.{}.feed_forward.gate_proj.weight",
        "layers.{}.feed_forward.w2.weight": "model.layers.{}.feed_forward.down_proj.weight",
        "layers.{}.feed_forward.w3.weight": "model.layers.{}.feed_forward.up_proj.weight",
        "layers.{}.moe.router.gate.weight": "model.layers.{}.feed_forward.router.weight",
        "layers.{}.moe.experts.gate_up": "model.layers.{}.feed_forward.experts.gate_up_proj",
        "layers.{}.moe.experts.down": "model.layers.{}.feed_forward.experts.down_proj",
        "layers.{}.moe.shared_experts.w1.weight": (
            "model.layers.{}.feed_forward.shared_expert.gate_proj.weight"
        ),
        "layers.{}.moe.shared_experts.w2.weight": (
            "model.layers.{}.feed_forward.shared_expert.down_proj.weight"
        ),
        "layers.{}.moe.shared_experts.w3.weight": (
            "model.layers.{}.feed_forward.shared_expert.up_proj.weight"
        ),
        "norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    expert_names: ClassVar = {}  # the files, too, hold a layer's experts in one tensor
