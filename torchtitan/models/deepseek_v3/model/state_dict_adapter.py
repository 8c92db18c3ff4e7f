"""Exchange weights with Hugging Face's `DeepseekV3ForCausalLM` and `DeepseekV2ForCausalLM`.

Published files of V3 also hold a layer for multi-token prediction, numbered after the others. It is
read by models with `mtp_depth`, except for its copies of the embedding and the output layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, ClassVar

from torchtitan.errors import CheckpointError
from torchtitan.models.common.expert_state_dict import ExpertsAdapter
from torchtitan.models.common.state_dict import numbers_of

_BIAS = ".mlp.gate.e_score_correction_bias"


class DeepSeekV3StateDictAdapter(ExpertsAdapter):
    names: ClassVar = {
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "layers.{}.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
        "layers.{}.attention.wq.weight": "model.layers.{}.self_attn.q_proj.weight",
        "layers.{}.attention.wq_a.weight": "model.layers.{}.self_attn.q_a_proj.weight",
        "layers.{}.attention.q_norm.weight": "model.layers.{}.self_attn.q_a_layernorm.weight",
        "layers.{}.attention.wq_b.weight": "model.layers.{}.self_attn.q_b_proj.weight",
        "layers.{}.attention.wkv_a.weight": "model.layers.{}.self_attn.kv_a_proj_with_mqa.weight",
        "layers.{}.attention.kv_norm.weight": "model.layers.{}.self_attn.kv_a_layernorm.weight",
        "layers.{}.attention.wkv_b.weight": "model.layers.{}.self_attn.kv_b_proj.weight",
        "layers.{}.attention.wo.weight": "model.layers.{}.self_attn.o_proj.weight",
        "layers.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
        "layers.{}.feed_forward.w1.weight": "model.layers.{}.mlp.gate_proj.weight",
        "layers.{}.feed_forward.w2.weight": "model.layers.{}.mlp.down_proj.weight",
        "layers.{}.feed_forward.w3.weight": "model.layers.{}.mlp.up_proj.weight",
        "layers.{}.moe.router.gate.weight": "model.layers.{}.mlp.gate.weight",
        "layers.{}.moe.router.selection_bias": "model.layers.{}.mlp.gate.e_score_correction_bias",
        "layers.{}.moe.shared_experts.w1.weight": (
            "model.layers.{}.mlp.shared_experts.gate_proj.weight"
        ),
        "layers.{}.moe.shared_experts.w2.weight": (
            "model.layers.{}.mlp.shared_experts.down_proj.weight"
        ),
        "layers.{}.moe.shared_experts.w3.weight": (
            "model.layers.{}.mlp.shared_experts.up_proj.weight"
        ),
        "layers.{}.embedding_norm.weight": "model.layers.{}.enorm.weight",
        "layers.{}.hidden_norm.weight": "model.layers.{}.hnorm.weight",
        "layers.{}.projection.weight": "model.layers.{}.eh_proj.weight",
        "layers.{}.norm.weight": "model.layers.{}.shared_head.norm.weight",
        "norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    expert_names: ClassVar = {
        "layers.{}.moe.experts.w1": "model.layers.{}.mlp.experts.{}.gate_proj.weight",
        "layers.{}.moe.experts.w2": "model.layers.{}.mlp.experts.{}.down_proj.weight",
        "layers.{}.moe.experts.w3": "model.layers.{}.mlp.experts.{}.up_proj.weight",
    }
    training_state: ClassVar = frozenset({"layers.{}.moe.router.load"})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        n_layers, depth = self.model_args.n_layers, self.model_args.mtp_depth
        self._layers = {f"mtp.{i}.": f"layers.{n_layers + i}." for i in range(depth)}
        """How names of blocks begin here -> as if they were further layers."""
        self._to_hf["mtp_embeddings.weight"] = self.names["tok_embeddings.weight"]

    def copies(self) -> dict[str, str]:
        copies = super().copies()
        embedding, output = (self._to_hf[f"{name}.weight"] for name in ("tok_embeddings", "output"))
        for layer in self._layers.values():
            copies[f"model.{layer}embed_tokens.weight"] = embedding
            copies[f"model.{layer}shared_head.head.weight"] = output
        return copies

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return super().to_hf(_with_beginnings(state_dict, self._layers))

    def from_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        read = {k: v for k, v in state_dict.items() if not self._is_left_out(k)}
        blocks = {layer: block for block, layer in self._layers.items()}
        converted = _with_beginnings(super().from_hf(read), blocks)
        if self._layers and "tok_embeddings.weight" in converted:
            converted["mtp_embeddings.weight"] = converted["tok_embeddings.weight"]
        return converted

    def check_names(self, names: Iterable[str]) -> None:
        super().check_names(names)
        for name in names:
            if name.endswith(_BIAS) and not self.model_args.moe.use_bias:
                raise CheckpointError(
                    f"checkpoint: tensor {name!r}: its experts are chosen with a bias, which the "
                    "model of this run does not have. Set model.args.moe.use_bias = true"
                )

    def _is_left_out(self, key: str) -> bool:
        args = self.model_args
        layer = next(map(int, numbers_of(key)), 0) - args.n_layers
        return args.mtp_depth <= layer < args.mtp_layers


def _with_beginnings(state_dict: dict[str, Any], others: dict[str, str]) -> dict[str, Any]:
    """Rename tensors by the beginning of their names, up to and including a number."""
    return {_BEGINNING.sub(lambda m: others.get(m[0], m[0]), k): v for k, v in state_dict.items()}


_BEGINNING = re.compile(r"^(mtp|layers)\.\d+\.")
