"""gpt-oss, for the tests that all models share."""

import torch
from transformers import GptOssConfig, GptOssForCausalLM

from model_cases.case import ModelCase, adding_up_experts
from torchtitan.models.common.moe import MoEArgs
from torchtitan.models.common.yarn import YarnScaling
from torchtitan.models.gpt_oss import GptOssModelArgs
from torchtitan.models.gpt_oss.model.sink_attention import SINK_FEATURES

PUBLISHED_SIZES = {"20B": 20_914_757_184, "120B": 116_829_156_672}

SIZES = {"dim": 64, "n_heads": 8, "head_dim": 24, "vocab_size": 96}
VARIANTS = {
    "grouped": GptOssModelArgs(
        n_layers=3,
        n_kv_heads=2,
        sliding_window=32,
        moe=MoEArgs(num_experts=8, top_k=3, hidden_dim=40, gate_bias=True),
        swiglu_limit=0.7,  # so low that many features reach it
        rope_scaling=YarnScaling(factor=8.0, original_max_seq_len=64, truncate=False),
        **SIZES,
    ),
    "tied": GptOssModelArgs(
        n_layers=2,
        n_kv_heads=8,
        sliding_window=100,
        moe=MoEArgs(num_experts=4, top_k=2, hidden_dim=64, gate_bias=True, aux_loss_weight=0.1),
        norm_eps=1e-6,
        rope_theta=10000.0,
        rope_scaling=YarnScaling(
            factor=32.0, beta_fast=16.0, beta_slow=2.0, original_max_seq_len=256, truncate=True
        ),
        tie_word_embeddings=True,
        **SIZES,
    ),
}


def hf_model(args: GptOssModelArgs) -> GptOssForCausalLM:
    config = GptOssConfig(
        hidden_size=args.dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        head_dim=args.head_dim,
        sliding_window=args.sliding_window,
        num_local_experts=args.moe.num_experts,
        num_experts_per_tok=args.moe.top_k,
        intermediate_size=args.moe.hidden_dim,
        swiglu_limit=args.swiglu_limit,
        vocab_size=args.vocab_size,
        rms_norm_eps=args.norm_eps,
        tie_word_embeddings=args.tie_word_embeddings,
        max_position_embeddings=1024,
        initializer_range=0.1,  # far from zero, so that a difference would show
        attn_implementation="eager",
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": args.rope_theta,
            "factor": args.rope_scaling.factor,
            "beta_fast": args.rope_scaling.beta_fast,
            "beta_slow": args.rope_scaling.beta_slow,
            "original_max_position_embeddings": args.rope_scaling.original_max_seq_len,
            "truncate": args.rope_scaling.truncate,
        },
    )
    torch.manual_seed(0)
    hf = GptOssForCausalLM(config).eval()
    for name, param in hf.named_parameters():
        if "bias" in name or "sinks" in name or "norm" in name:  # which start alike
            param.data += 0.5 * torch.randn_like(param)
    return hf


HF_CONFIG = {  # that of gpt-oss-20b, as published but for the quantization
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": 201088,
}


def uncounted_flops(args: GptOssModelArgs, seq_len: int) -> int:
    """With 8 rows of ones, the gradients of the experts' biases; the sink's key and features."""
    biases = args.n_layers * args.moe.top_k * 2 * 8 * (args.dim + 2 * args.moe.hidden_dim)
    sinks = (seq_len + 1) * (args.head_dim + SINK_FEATURES) - seq_len * args.head_dim
    sinks *= 12 * args.n_layers * args.n_heads
    return adding_up_experts(args, args.n_layers) + biases + sinks


CASE = ModelCase(
    published={"20B": HF_CONFIG},
    refused=[
        ({"model_type": "llama"}, r"model_type is 'llama', not 'gpt_oss'"),
        ({"attention_bias": False}, r"attention_bias = False is not supported"),
        ({"hidden_act": "gelu"}, r"hidden_act = 'gelu' is not supported"),
        ({"swiglu_alpha": 1.0}, r"swiglu_alpha = 1.0 is not supported"),
        ({"layer_types": ["full_attention"] * 24}, r"layer_types = .* is not supported"),
        ({"rope_scaling": None}, r"rope_scaling = None is not supported"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, r"rope_scaling = .*linear"),
        (
            {"quantization_config": {"quant_method": "mxfp4"}},
            r"mxfp4.* not s.*convert dequantize F",
        ),
        ({"num_nextn_predict_layers": 4}, r"unknown fields: num_nextn_predict_layers = 4$"),
        ({"sliding_window": None}, r"sliding_window = None must be of type int"),
        ({"intermediate_size": 100}, r"hidden_dim \(100\) must be a multiple of 8"),
    ],
    required=["hidden_size", "rope_theta", "num_local_experts"],
    variants=VARIANTS,
    hf_model=hf_model,
    published_sizes=PUBLISHED_SIZES,
    uncounted_flops=uncounted_flops,
)
