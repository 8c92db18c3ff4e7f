"""Llama 3, for the tests that all models share."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from model_cases.case import ModelCase
from torchtitan.models.common.rope import RopeScaling
from torchtitan.models.common.yarn import YarnScaling
from torchtitan.models.llama3 import Llama3ModelArgs

PUBLISHED_SIZES = {
    "1B": 1_235_814_400,
    "3B": 3_212_749_824,
    "8B": 8_030_261_248,
    "70B": 70_553_706_496,
    "405B": 405_853_388_800,
}

VARIANTS = {
    "llama-3": Llama3ModelArgs(
        dim=64, n_layers=2, n_heads=4, n_kv_heads=4, ffn_dim=160, vocab_size=96
    ),
    "llama-3.1, grouped": Llama3ModelArgs(
        dim=64,
        n_layers=3,
        n_heads=8,
        n_kv_heads=2,
        ffn_dim=96,
        vocab_size=96,
        rope_scaling=RopeScaling(factor=8.0, original_max_seq_len=64),
    ),
    "llama-3.2, tied": Llama3ModelArgs(
        dim=96,
        n_layers=2,
        n_heads=6,
        n_kv_heads=3,
        ffn_dim=128,
        vocab_size=120,
        norm_eps=1e-6,
        rope_theta=10000.0,
        rope_scaling=RopeScaling(
            factor=32.0, low_freq_factor=2.0, high_freq_factor=8.0, original_max_seq_len=128
        ),
        tie_word_embeddings=True,
    ),
    "stretched by YaRN": Llama3ModelArgs(
        dim=64,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        ffn_dim=96,
        vocab_size=96,
        rope_theta=10000.0,
        rope_scaling=YarnScaling(factor=4.0, original_max_seq_len=32),
    ),
}


def rope_parameters(args: Any) -> dict[str, Any]:
    """Of a `config.json`, from args with `rope_theta` and `rope_scaling`."""
    rope = {"rope_type": "default", "rope_theta": args.rope_theta}
    if isinstance(args.rope_scaling, YarnScaling):
        rope |= {
            "rope_type": "yarn",
            "factor": args.rope_scaling.factor,
            "original_max_position_embeddings": args.rope_scaling.original_max_seq_len,
        }
    elif args.rope_scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": args.rope_scaling.factor,
            "low_freq_factor": args.rope_scaling.low_freq_factor,
            "high_freq_factor": args.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": args.rope_scaling.original_max_seq_len,
        }
    return rope


def hf_model(args: Llama3ModelArgs) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        intermediate_size=args.ffn_dim,
        vocab_size=args.vocab_size,
        rms_norm_eps=args.norm_eps,
        tie_word_embeddings=args.tie_word_embeddings,
        max_position_embeddings=1024,
        initializer_range=0.1,  # far from zero, so that a difference would show
        rope_parameters=rope_parameters(args),
    )
    return LlamaForCausalLM(config).eval()


SCALING = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
HF_CONFIG = {  # that of Llama 3.1 8B, as published
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": SCALING,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}

CASE = ModelCase(
    published={"8B": HF_CONFIG},
    refused=[
        ({"model_type": "qwen3"}, r"model_type is 'qwen3', not 'llama'"),
        ({"attention_bias": True}, r"attention_bias = True is not supported"),
        ({"mlp_bias": True}, r"mlp_bias = True is not supported"),
        ({"hidden_act": "gelu"}, r"hidden_act = 'gelu' is not supported"),
        ({"head_dim": 64}, r"head_dim = 64 is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, r"rope_scaling = .*yarn.* not supp"),
        ({"rope_scaling": SCALING | {"factor": "8"}}, r"factor = '8' must be a number"),
        ({"rope_scaling": SCALING | {"factor": None}}, r"factor = None must be a number"),
        ({"rope_scaling": SCALING | {"high_freq_factor": 0.5}}, r"high_freq.* \(0.5\) must be at"),
        ({"rope_scaling": "llama3"}, r"rope_scaling = 'llama3' must be of type dict"),
        ({"attention_sinks": 4}, r"unknown fields: attention_sinks = 4$"),
        ({"num_hidden_layers": "32"}, r"num_hidden_layers = '32' must be of type int"),
        ({"num_key_value_heads": 3}, r"n_kv_heads \(3\) must divide n_heads"),
    ],
    required=["hidden_size", "rope_theta", "num_attention_heads"],
    variants=VARIANTS,
    hf_model=hf_model,
    published_sizes=PUBLISHED_SIZES,
)
