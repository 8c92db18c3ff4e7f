"""Exchange gpt-oss weights with Hugging Face's `GptOssForCausalLM`, in bfloat16 or float32.

Tensors keep their shapes: only names change.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from torchtitan.errors import CheckpointError
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

    def from_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        self.check_names(state_dict)
        return super().from_hf(state_dict)

    def check_names(self, names: Iterable[str]) -> None:
        for name in names:
            if name.endswith(("_proj_blocks", "_proj_scales")):
                raise CheckpointError(
                    f"checkpoint: tensor {name!r} belongs to MXFP4 weights, which are not "
                    "supported. Let transformers dequantize the model "
                    "(Mxfp4Config(dequantize=True)) and save it in bfloat16"
                )
