"""Exchange gpt-oss weights with Hugging Face's `GptOssForCausalLM`, in bfloat16 or float32.

Tensors keep their shapes: only names change.
"""

from __future__ import annotations

from typing import ClassVar

from torchtitan.models.common.expert_state_dict import ExpertsAdapter


class GptOssStateDictAdapter(ExpertsAdapter):
    names: ClassVar = {
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "layers.{}.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
        "layers.{}.attention.wq.weight": "model.layers.{}.self_attn.q_proj.weight",
        "layers.{}.attention.wq.bias": "model.layers.{}.self_attn.q_proj.bias",
        "layers.{}.attention.wk.weight": "model.layers.{}.self_attn.k_proj.weight",
        "layers.{}.attention.wk.bias": "model.layers.{}.self_attn.k_proj.bias",
        "layers.{}.attention.wv.weight": "model.layers.{}.self_attn.v_proj.weight",
        "layers.{}.attention.wv.bias": "model.layers.{}.self_attn.v_proj.bias",
        "layers.{}.attention.wo.weight": "model.layers.{}.self_attn.o_proj.weight",
        "layers.{}.attention.wo.bias": "model.layers.{}.self_attn.o_proj.bias",
        "layers.{}.attention.sinks.weight": "model.layers.{}.self_attn.sinks",
        "layers.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
        "layers.{}.moe.router.gate.weight": "model.layers.{}.mlp.router.weight",
        "layers.{}.moe.router.gate.bias": "model.layers.{}.mlp.router.bias",
        "layers.{}.moe.experts.gate_up": "model.layers.{}.mlp.experts.gate_up_proj",
        "layers.{}.moe.experts.gate_up_bias": "model.layers.{}.mlp.experts.gate_up_proj_bias",
        "layers.{}.moe.experts.down": "model.layers.{}.mlp.experts.down_proj",
        "layers.{}.moe.experts.down_bias": "model.layers.{}.mlp.experts.down_proj_bias",
        "norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    expert_names: ClassVar = {}  # the files, too, hold a layer's experts in one tensor
