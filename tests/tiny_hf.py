"""Tiny random models of `transformers`, one of each architecture that we have.

The library, a second of imports, is imported by what needs it: ranks import the files of tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from torchtitan.models.from_hf import train_spec_of_hf_folder
from torchtitan.protocols import ModelProtocol

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

WINDOW = 16
"""Of sliding windows and chunks."""
VOCAB_SIZE = 264
_COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,  # far from zero, so that a difference would show
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 64,
}

CONFIGS: dict[str, dict] = {
    "llama3": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "qwen3": {"model_type": "qwen3_moe", **_EXPERTS, "num_experts": 4, "norm_topk_prob": True},
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        **_EXPERTS,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 24,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "num_nextn_predict_layers": 0,
        "rope_parameters": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        "sliding_window": WINDOW,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": _YARN | {"truncate": False},
    },
    "llama4": {
        "model_type": "llama4_text",
        "intermediate_size_mlp": 64,
        "num_local_experts": 4,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": WINDOW,
        "floor_scale": 16,
        "attn_scale": 0.3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "sliding_window": WINDOW,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 16,
    },
}
"""Name of our model -> fields of its `config.json`."""


def hf_config(name: str, **fields: object) -> PretrainedConfig:
    import transformers

    fields = _COMMON | CONFIGS[name] | fields
    config_class = transformers.CONFIG_MAPPING[fields.pop("model_type")]
    return config_class(**fields)


def hf_model(name: str, **fields: object) -> PreTrainedModel:
    """A model of `transformers` with random weights, those that start alike included."""
    import transformers

    config = hf_config(name, **fields)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for key, tensor in tensors.items():
        if any(word in key for word in ("norm", "bias", "sinks")):
            tensor.data += 0.3 * torch.randn_like(tensor)
    return model.eval()


def saved(name: str, folder: Path, **fields: object) -> tuple[PreTrainedModel, ModelProtocol]:
    """`hf_model`, saved in `folder`, and our model that was loaded from there."""
    hf = hf_model(name, **fields)
    hf.save_pretrained(folder)
    _, spec = train_spec_of_hf_folder(folder)
    return hf, spec.model_cls(spec.model_args).load_checkpoint(folder).eval()


def hf_greedy(hf: PreTrainedModel, prompt: list[int], max_new_tokens: int) -> list[int]:
    """What `transformers` continues a prompt with."""
    input_ids = torch.tensor([prompt])
    out = hf.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()
