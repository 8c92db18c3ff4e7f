"""DeepSeek-V3 and V2, for the tests that all models share."""

import dataclasses

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
)

from model_cases.case import ModelCase, adding_up_experts
from torchtitan.models.common.moe import MoEArgs
from torchtitan.models.common.yarn import YarnScaling
from torchtitan.models.deepseek_v3 import DeepSeekV3ModelArgs

PUBLISHED_SIZES = {  # of the checkpoints, without the biases of V3's routers
    "16B": 15_706_484_224,
    "236B": 235_741_434_880,
    "671B": 671_026_404_352,
}

MOE_V3 = MoEArgs(
    num_experts=8,
    top_k=3,
    hidden_dim=40,
    num_shared_experts=2,
    score_func="sigmoid",
    route_scale=2.5,
    n_groups=4,
    top_groups=2,
    use_bias=True,
)
MOE_V2 = MoEArgs(
    num_experts=8,
    top_k=3,
    hidden_dim=40,
    num_shared_experts=2,
    normalize_weights=False,
    route_scale=16.0,
    n_groups=4,
    top_groups=2,
    group_score_experts=1,
)
SIZES = {
    "dim": 64,
    "n_layers": 3,
    "n_dense_layers": 1,
    "n_heads": 4,
    "q_rank": 48,
    "kv_rank": 32,
    "qk_nope_dim": 24,
    "qk_rope_dim": 16,
    "v_dim": 20,
    "ffn_dim": 96,
    "vocab_size": 96,
}
V3 = DeepSeekV3ModelArgs(moe=MOE_V3, **SIZES)
YARN = YarnScaling(factor=4.0, original_max_seq_len=64, mscale=1.0, mscale_all_dim=0.7)
VARIANTS = {
    "V3": V3,
    "V3, yarn": dataclasses.replace(V3, yarn=YARN),
    "V3, yarn as in the paper": dataclasses.replace(
        V3, yarn=YarnScaling(factor=8.0, original_max_seq_len=32, beta_fast=8.0, beta_slow=2.0)
    ),
    "V3, one group, queries made directly, tied": dataclasses.replace(
        V3,
        q_rank=None,
        n_dense_layers=0,
        norm_eps=1e-5,
        tie_word_embeddings=True,
        moe=dataclasses.replace(
            MOE_V3, n_groups=1, top_groups=1, normalize_weights=False, num_shared_experts=1
        ),
    ),
    "V2": dataclasses.replace(V3, moe=MOE_V2, yarn=YARN, rope_theta=5000.0),
    "V2 Lite": dataclasses.replace(
        V3,
        q_rank=None,
        moe=dataclasses.replace(MOE_V2, n_groups=1, top_groups=1, route_scale=1.0),
    ),
}


def hf_config(args: DeepSeekV3ModelArgs) -> dict:
    rope = {"rope_type": "default", "rope_theta": args.rope_theta}
    if args.yarn is not None:
        rope |= {
            "rope_type": "yarn",
            "factor": args.yarn.factor,
            "original_max_position_embeddings": args.yarn.original_max_seq_len,
            "beta_fast": args.yarn.beta_fast,
            "beta_slow": args.yarn.beta_slow,
        }
        if args.yarn.mscale_all_dim:
            rope |= {"mscale": args.yarn.mscale, "mscale_all_dim": args.yarn.mscale_all_dim}
    return {
        "hidden_size": args.dim,
        "num_hidden_layers": args.n_layers,
        "first_k_dense_replace": args.n_dense_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_heads,
        "q_lora_rank": args.q_rank,
        "kv_lora_rank": args.kv_rank,
        "qk_nope_head_dim": args.qk_nope_dim,
        "qk_rope_head_dim": args.qk_rope_dim,
        "v_head_dim": args.v_dim,
        "intermediate_size": args.ffn_dim,
        "vocab_size": args.vocab_size,
        "rms_norm_eps": args.norm_eps,
        "tie_word_embeddings": args.tie_word_embeddings,
        "n_routed_experts": args.moe.num_experts,
        "num_experts_per_tok": args.moe.top_k,
        "moe_intermediate_size": args.moe.hidden_dim,
        "n_shared_experts": args.moe.num_shared_experts,
        "norm_topk_prob": args.moe.normalize_weights,
        "routed_scaling_factor": args.moe.route_scale,
        "n_group": args.moe.n_groups,
        "topk_group": args.moe.top_groups,
        "max_position_embeddings": 1024,
        "initializer_range": 0.1,  # far from zero, so that a difference would show
        "rope_parameters": rope,
    }


def hf_model(args: DeepSeekV3ModelArgs) -> DeepseekV2ForCausalLM | DeepseekV3ForCausalLM:
    torch.manual_seed(0)
    if args.moe.score_func == "softmax":
        method = "greedy" if args.moe.n_groups == 1 else "group_limited_greedy"
        config = DeepseekV2Config(**hf_config(args), topk_method=method)
        return DeepseekV2ForCausalLM(config).eval()
    model = DeepseekV3ForCausalLM(
        DeepseekV3Config(**hf_config(args), num_nextn_predict_layers=args.mtp_layers)
    )
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.1)
    return model.eval()


HF_CONFIG_V3 = {  # as published, without the quantization
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
HF_CONFIG_V2_LITE = {
    key: value for key, value in HF_CONFIG_V3.items() if key != "num_nextn_predict_layers"
} | {
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "rope_scaling": HF_CONFIG_V3["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_group": 1,
    "topk_method": "greedy",
    "vocab_size": 102400,
}

CASE = ModelCase(
    published={"671B": HF_CONFIG_V3, "16B": HF_CONFIG_V2_LITE},
    refused=[
        ({"model_type": "llama"}, r"model_type is 'llama', not 'deepseek_v3' or 'deepseek_v2'"),
        ({"attention_bias": True}, r"attention_bias = True is not supported"),
        ({"hidden_act": "gelu"}, r"hidden_act = 'gelu' is not supported"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantization_config = .*fp8.* not su"),
        ({"scoring_func": "softmax"}, r"scoring_func = 'softmax' is not supported"),
        ({"topk_method": "greedy"}, r"topk_method = 'greedy' is not supported"),
        ({"moe_layer_freq": 2}, r"moe_layer_freq = 2 is not supported"),
        ({"num_key_value_heads": 8}, r"num_key_value_heads = 8 is not supported"),
        ({"rope_interleave": False}, r"rope_interleave = False is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, r"rope_scaling = .*linear.* not sup"),
        ({"index_topk": 2048}, r"unknown fields: index_topk = 2048$"),
        ({"num_hidden_layers": "61"}, r"num_hidden_layers = '61' must be of type int"),
        ({"first_k_dense_replace": 62}, r"n_dense_layers \(62\) must be at most n_layers"),
        ({"moe_intermediate_size": 100}, r"hidden_dim \(100\) must be a multiple of 8"),
        ({"n_group": 7}, r"n_groups \(7\) must divide num_experts \(256\)"),
    ],
    required=["hidden_size", "rope_theta", "n_routed_experts", "kv_lora_rank"],
    variants=VARIANTS,
    hf_model=hf_model,
    published_sizes=PUBLISHED_SIZES,
    uncounted_flops=lambda args, _: adding_up_experts(args, args.n_layers - args.n_dense_layers),
)
