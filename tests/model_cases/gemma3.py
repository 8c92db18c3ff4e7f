"""Gemma 3, for the tests that all models share."""

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from model_cases.case import ModelCase
from torchtitan.models.gemma3 import Gemma3ModelArgs

PUBLISHED_SIZES = {  # of the larger ones, without the tower that reads images and its projection
    "270M": 268_098_176,
    "1B": 999_885_952,
    "4B": 4_300_079_472 - 416_866_032 - 1152 * (2560 + 1),
    "12B": 12_187_325_040 - 416_866_032 - 1152 * (3840 + 1),
    "27B": 27_432_406_640 - 416_866_032 - 1152 * (5376 + 1),
}

SIZES = {"dim": 64, "n_heads": 4, "ffn_dim": 160, "vocab_size": 96}
VARIANTS = {
    "small": Gemma3ModelArgs(
        n_layers=7,
        n_kv_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=32,
        rope_factor=1.0,
        **SIZES,
    ),
    "stretched": Gemma3ModelArgs(
        n_layers=4,
        n_kv_heads=2,
        head_dim=24,
        query_pre_attn_scalar=42,
        sliding_window=100,
        full_attention_every=3,
        norm_eps=1e-5,
        rope_theta=50000.0,
        rope_factor=8.0,
        window_rope_theta=1000.0,
        **SIZES,
    ),
    "untied": Gemma3ModelArgs(
        n_layers=2,
        n_kv_heads=4,
        head_dim=24,
        query_pre_attn_scalar=24,
        sliding_window=64,
        full_attention_every=2,
        tie_word_embeddings=False,
        **SIZES,
    ),
}


def hf_model(args: Gemma3ModelArgs) -> Gemma3ForCausalLM:
    full = {"rope_type": "default", "rope_theta": args.rope_theta}
    if args.rope_factor != 1:
        full |= {"rope_type": "linear", "factor": args.rope_factor}
    config = Gemma3TextConfig(
        hidden_size=args.dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        head_dim=args.head_dim,
        query_pre_attn_scalar=args.query_pre_attn_scalar,
        intermediate_size=args.ffn_dim,
        sliding_window=args.sliding_window,
        sliding_window_pattern=args.full_attention_every,
        vocab_size=args.vocab_size,
        rms_norm_eps=args.norm_eps,
        tie_word_embeddings=args.tie_word_embeddings,
        max_position_embeddings=1024,
        pad_token_id=None,  # whose embedding would get no gradient
        initializer_range=0.1,  # far from zero, so that a difference would show
        rope_parameters={
            "full_attention": full,
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": args.window_rope_theta,
            },
        },
    )
    torch.manual_seed(0)
    hf = Gemma3ForCausalLM(config).eval()
    for name, param in hf.named_parameters():
        if "norm" in name:  # which start alike
            param.data += 0.5 * torch.randn_like(param)
    return hf


HF_CONFIG = {  # that of gemma-3-1b-pt, as published
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": 1,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "use_cache": True,
    "vocab_size": 262144,
}
WINDOW_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

CASE = ModelCase(
    published={"1B": HF_CONFIG},
    refused=[
        ({"model_type": "gemma3"}, r"model_type is 'gemma3', not 'gemma3_text'"),
        ({"attention_bias": True}, r"attention_bias = True is not supported"),
        ({"hidden_activation": "silu"}, r"hidden_activation = 'silu' is not supported"),
        ({"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping = 50.0 is not supported"),
        ({"final_logit_softcapping": 30.0}, r"final_logit_softcapping = 30.0 is not supported"),
        ({"use_bidirectional_attention": True}, r"use_bidirectional_attention = True is not supp"),
        ({"layer_types": ["full_attention"] * 25 + ["sliding_attention"]}, r"layer_types = .*"),
        ({"layer_types": ["sliding_attention"] * 26}, r"layer_types = .* is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, r"rope_scaling = .*yarn.* not"),
        ({"rope_parameters": {"sliding_attention": WINDOW_ROPE}}, r"rope_parameters = .* not supp"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": "8"}},
            r"factor = '8' must be a number",
        ),
        ({"num_kv_shared_layers": 4}, r"unknown fields: num_kv_shared_layers = 4$"),
        ({"sliding_window": None}, r"sliding_window = None must be of type int"),
    ],
    required=["hidden_size", "rope_theta", "rope_local_base_freq"],
    variants=VARIANTS,
    hf_model=hf_model,
    published_sizes=PUBLISHED_SIZES,
)
