"""Qwen3, for the tests that all models share."""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from model_cases.case import ModelCase, adding_up_experts
from torchtitan.models.common.moe import MoEArgs
from torchtitan.models.common.yarn import YarnScaling
from torchtitan.models.qwen3 import Qwen3ModelArgs

PUBLISHED_SIZES = {  # of the checkpoints, each tensor counted once
    "0.6B": 596_049_920,
    "1.7B": 1_720_574_976,
    "4B": 4_022_468_096,
    "8B": 8_190_735_360,
    "14B": 14_768_307_200,
    "32B": 32_762_123_264,
    "30B-A3B": 30_532_122_624,
    "235B-A22B": 235_093_634_560,
}

SIZES = {"dim": 64, "n_layers": 2, "n_heads": 4, "head_dim": 24, "vocab_size": 96}
VARIANTS = {
    "dense, grouped": Qwen3ModelArgs(n_kv_heads=2, ffn_dim=160, **SIZES),
    "dense, tied": Qwen3ModelArgs(
        n_kv_heads=4,
        ffn_dim=96,
        rope_theta=10000.0,
        norm_eps=1e-5,
        tie_word_embeddings=True,
        **SIZES,
    ),
    "experts": Qwen3ModelArgs(
        n_kv_heads=2, ffn_dim=96, moe=MoEArgs(num_experts=8, top_k=3, hidden_dim=40), **SIZES
    ),
    "dense, stretched": Qwen3ModelArgs(
        n_kv_heads=2,
        ffn_dim=96,
        rope_scaling=YarnScaling(factor=4.0, original_max_seq_len=32),
        **SIZES,
    ),
    "experts, weights as they are": Qwen3ModelArgs(
        n_kv_heads=2,
        ffn_dim=96,
        moe=MoEArgs(
            num_experts=4,
            top_k=2,
            hidden_dim=40,
            normalize_weights=False,
            aux_loss_weight=0.1,
            z_loss_weight=0.1,
        ),
        **SIZES,
    ),
}


def hf_model(args: Qwen3ModelArgs) -> Qwen3ForCausalLM | Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    options = {
        "hidden_size": args.dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "intermediate_size": args.ffn_dim,
        "vocab_size": args.vocab_size,
        "rms_norm_eps": args.norm_eps,
        "tie_word_embeddings": args.tie_word_embeddings,
        "max_position_embeddings": 1024,
        "initializer_range": 0.1,  # far from zero, so that a difference would show
        "rope_parameters": {"rope_type": "default", "rope_theta": args.rope_theta},
    }
    if args.rope_scaling is not None:
        options["rope_parameters"] |= {
            "rope_type": "yarn",
            "factor": args.rope_scaling.factor,
            "original_max_position_embeddings": args.rope_scaling.original_max_seq_len,
        }
    if args.moe is None:
        return Qwen3ForCausalLM(Qwen3Config(**options)).eval()
    options |= {
        "num_experts": args.moe.num_experts,
        "num_experts_per_tok": args.moe.top_k,
        "moe_intermediate_size": args.moe.hidden_dim,
        "norm_topk_prob": args.moe.normalize_weights,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**options)).eval()


HF_CONFIG = {  # that of Qwen3-30B-A3B, as published
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

CASE = ModelCase(
    published={"30B-A3B": HF_CONFIG},
    refused=[
        ({"model_type": "llama"}, r"model_type is 'llama', not 'qwen3' or 'qwen3_moe'"),
        ({"attention_bias": True}, r"attention_bias = True is not supported"),
        ({"use_sliding_window": True}, r"use_sliding_window = True is not supported"),
        ({"hidden_act": "gelu"}, r"hidden_act = 'gelu' is not supported"),
        ({"mlp_only_layers": [3]}, r"mlp_only_layers = \[3\] is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, r"rope_scaling = .*yarn.* not supp"),
        ({"attention_sinks": 4}, r"unknown fields: attention_sinks = 4$"),
        ({"num_hidden_layers": "48"}, r"num_hidden_layers = '48' must be of type int"),
        ({"moe_intermediate_size": 100}, r"hidden_dim \(100\) must be a multiple of 8"),
        ({"num_experts_per_tok": 129}, r"top_k \(129\) must be from 1 to num_experts \(128\)"),
    ],
    required=["hidden_size", "rope_theta", "num_experts"],
    variants=VARIANTS,
    hf_model=hf_model,
    published_sizes=PUBLISHED_SIZES,
    uncounted_flops=lambda args, _: adding_up_experts(args, args.n_layers) if args.moe else 0,
)
