"""Llama 4, for the tests that all models share."""

import dataclasses

import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig

from model_cases.case import ModelCase
from model_cases.llama3 import rope_parameters
from torchtitan.models.common.rope import RopeScaling
from torchtitan.models.llama4 import Llama4ModelArgs
from torchtitan.models.llama4.model.args import MOE

MAVERICK = Llama4ModelArgs(
    dim=64,
    n_layers=4,
    n_heads=4,
    n_kv_heads=2,
    head_dim=24,
    ffn_dim=96,
    moe=dataclasses.replace(MOE, num_experts=8, hidden_dim=40),
    moe_interval=2,
    chunk=48,
    qk_norm=False,
    temperature_floor=32,
    temperature_scale=0.3,
    vocab_size=96,
)
VARIANTS = {
    "interleaved, as Maverick": MAVERICK,
    "all experts, as Scout": dataclasses.replace(
        MAVERICK,
        moe_interval=1,
        qk_norm=True,
        moe=dataclasses.replace(MOE, num_experts=4, hidden_dim=40),
        rope_scaling=RopeScaling(
            factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_max_seq_len=64
        ),
    ),
    "two experts, no temperature, tied": dataclasses.replace(
        MAVERICK,
        n_kv_heads=4,
        nope_interval=2,
        norm_eps=1e-6,
        rope_theta=10000.0,
        moe=dataclasses.replace(MOE, num_experts=8, top_k=2, hidden_dim=40),
        temperature_scale=0.0,
        tie_word_embeddings=True,
    ),
}


def hf_model(args: Llama4ModelArgs) -> Llama4ForCausalLM:
    config = Llama4TextConfig(
        hidden_size=args.dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        head_dim=args.head_dim,
        intermediate_size_mlp=args.ffn_dim,
        intermediate_size=args.moe.hidden_dim,
        num_local_experts=args.moe.num_experts,
        num_experts_per_tok=args.moe.top_k,
        interleave_moe_layer_step=args.moe_interval,
        no_rope_layer_interval=args.nope_interval,
        attention_chunk_size=args.chunk,
        use_qk_norm=args.qk_norm,
        attn_temperature_tuning=args.temperature_scale > 0,
        floor_scale=args.temperature_floor,
        attn_scale=args.temperature_scale or 0.1,
        vocab_size=args.vocab_size,
        rms_norm_eps=args.norm_eps,
        tie_word_embeddings=args.tie_word_embeddings,
        max_position_embeddings=1024,
        initializer_range=0.1,  # far from zero, so that a difference would show
        rope_parameters=rope_parameters(args),
    )
    torch.manual_seed(0)
    return Llama4ForCausalLM(config).eval()


HF_CONFIG = {  # the text model's part of Scout's, as published
    "attention_bias": False,
    "attention_chunk_size": 8192,
    "attention_dropout": 0.0,
    "attn_scale": 0.1,
    "attn_temperature_tuning": 4,
    "bos_token_id": 200000,
    "eos_token_id": [200001, 200007, 200008],
    "floor_scale": 8192,
    "for_llm_compressor": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "interleave_moe_layer_step": 1,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "max_position_embeddings": 10485760,
    "model_type": "llama4_text",
    "no_rope_layers": [],
    "num_attention_heads": 40,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 48,
    "num_key_value_heads": 8,
    "num_local_experts": 16,
    "output_router_logits": False,
    "pad_token_id": 200018,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 16.0,
        "high_freq_factor": 1.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_qk_norm": True,
    "vocab_size": 202048,
}

CASE = ModelCase(
    published={"109B-A17B": HF_CONFIG},
    refused=[
        ({"model_type": "llama"}, r"model_type is 'llama', not 'llama4_text'"),
        ({"attention_bias": True}, r"attention_bias = True is not supported"),
        ({"hidden_act": "gelu"}, r"hidden_act = 'gelu' is not supported"),
        ({"router_jitter_noise": 0.1}, r"router_jitter_noise = 0\.1 is not supported"),
        ({"attn_temperature_tuning": 7}, r"attn_temperature_tuning = 7 is not supported"),
        ({"no_rope_layers": [1, 0] * 24}, r"no_rope_layers = \[1, 0.* is not supported"),
        ({"moe_layers": [3]}, r"moe_layers = \[3\] is not supported"),
        ({"layer_types": ["full_attention"]}, r"layer_types = \['full_att.* is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, r"rope_scaling = .*yarn.* not supp"),
        ({"attention_sinks": 4}, r"unknown fields: attention_sinks = 4$"),
        ({"num_hidden_layers": "48"}, r"num_hidden_layers = '48' must be of type int"),
        ({"attention_chunk_size": None}, r"attention_chunk_size = None must be of type int"),
        ({"num_experts_per_tok": 17}, r"top_k \(17\) must be from 1 to num_experts \(16\)"),
    ],
    required=["hidden_size", "rope_theta", "num_local_experts"],
    variants=VARIANTS,
    hf_model=hf_model,
)
