import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from torchtitan.config import JobConfig
from torchtitan.errors import CheckpointError, ConfigError
from torchtitan.models.common.moe import MoEArgs
from torchtitan.models.deepseek_v3 import MODEL_CONFIGS, DeepSeekV3Model, DeepSeekV3ModelArgs

PUBLISHED_SIZES = {  # of the checkpoints, without the biases of V3's routers
    "16B": 15_706_484_224,
    "236B": 235_741_434_880,
    "671B": 671_026_404_352,
}
TINY = DeepSeekV3ModelArgs(
    dim=32,
    n_layers=3,
    n_dense_layers=1,
    n_heads=4,
    q_rank=24,
    kv_rank=16,
    qk_nope_dim=12,
    qk_rope_dim=8,
    v_dim=10,
    ffn_dim=48,
    moe=MoEArgs(num_experts=6, top_k=2, hidden_dim=24, num_shared_experts=2),
    vocab_size=40,
)
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


def grouped_mm_flops(rows, weights, *args, out_shape, **kwargs):
    """Not known to the flop counter: two operands of `[rows, in]`, `[experts, in, out]`, or two of
    `[in, rows]`, `[rows, out]`."""
    return 2 * rows[0] * rows[1] * weights[-1]


@pytest.mark.parametrize("flavor", MODEL_CONFIGS)
def test_parameters_are_counted_exactly(flavor):
    args = MODEL_CONFIGS[flavor]
    with torch.device("meta"):
        model = DeepSeekV3Model(args)
    counted, _ = args.get_nparams_and_flops(seq_len=128)
    assert counted == sum(p.numel() for p in model.parameters())
    assert counted == PUBLISHED_SIZES.get(flavor, counted)


@pytest.mark.parametrize("q_rank", [24, None])
@pytest.mark.parametrize("tied", [False, True])
def test_flops_equal_those_counted_in_forward_and_backward(q_rank, tied):
    args = dataclasses.replace(TINY, q_rank=q_rank, tie_word_embeddings=tied)
    tokens = torch.randint(args.vocab_size, (2, 24))
    model = DeepSeekV3Model(args)
    model.init_weights()
    mapping = {torch.ops.aten._grouped_mm: grouped_mm_flops}
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens).sum().backward()
    _, flops_per_token = args.get_nparams_and_flops(seq_len=24)
    # Adding up what its experts made of a token is a product too, which the formula leaves out.
    adding_up = 6 * args.moe.top_k * args.dim * (args.n_layers - args.n_dense_layers)
    assert counter.get_total_flops() == (flops_per_token + adding_up) * tokens.numel()


def test_more_dense_layers_than_layers_are_refused():
    with pytest.raises(ValueError, match=r"n_dense_layers \(4\) must be from 0 to n_layers \(3\)"):
        dataclasses.replace(TINY, n_dense_layers=4)


def test_degrees_that_split_a_head_or_an_expert_are_refused():
    config = JobConfig()
    config.parallelism.tensor_parallel_degree = 8
    with pytest.raises(ConfigError, match=r"n_heads = 4.*Degrees that do: 1, 2, 4$"):
        TINY.update_from_config(config)
    config.parallelism.tensor_parallel_degree = 2
    TINY.update_from_config(config)
    config.parallelism.expert_tensor_parallel_degree = 2
    with pytest.raises(ConfigError, match=r"hidden_dim = 24.*Degrees that do: 1, 3$"):
        TINY.update_from_config(config)


def test_a_ring_is_refused_where_keys_and_values_differ_in_size():
    config = JobConfig()
    config.parallelism.context_parallel_method = "ring"
    TINY.update_from_config(config)
    config.parallelism.context_parallel_degree = 2
    dataclasses.replace(TINY, v_dim=20).update_from_config(config)
    with pytest.raises(ConfigError, match=r"keys of 20 features and values of 10\. Use 'allgather"):
        TINY.update_from_config(config)


def test_the_job_chooses_the_attention_kernel():
    config = JobConfig()
    config.model.attention = "sdpa"
    assert TINY.update_from_config(config).attention == "sdpa"
    assert TINY.attention == "auto", "a flavor was changed in place"


@pytest.mark.parametrize(
    ("config", "flavor"), [(HF_CONFIG_V3, "671B"), (HF_CONFIG_V2_LITE, "16B")], ids=["V3", "Lite"]
)
def test_a_published_config_gives_the_flavor(config, flavor):
    expected = MODEL_CONFIGS[flavor]
    moe = dataclasses.replace(expected.moe, aux_loss_weight=0.0)
    assert DeepSeekV3ModelArgs.from_hf_config(config) == dataclasses.replace(expected, moe=moe)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
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
        ({"first_k_dense_replace": 62}, r"n_dense_layers \(62\) must be from 0 to n_layers"),
        ({"moe_intermediate_size": 100}, r"hidden_dim \(100\) must be a multiple of 8"),
        ({"n_group": 7}, r"n_groups \(7\) must divide num_experts \(256\)"),
    ],
)
def test_a_config_of_another_architecture_is_refused(changes, message):
    with pytest.raises(CheckpointError, match=message):
        DeepSeekV3ModelArgs.from_hf_config(HF_CONFIG_V3 | changes)


@pytest.mark.parametrize("name", ["hidden_size", "rope_theta", "n_routed_experts", "kv_lora_rank"])
def test_a_missing_field_is_named(name):
    config = {key: value for key, value in HF_CONFIG_V3.items() if key != name}
    with pytest.raises(CheckpointError, match=f"config.json lacks '{name}'"):
        DeepSeekV3ModelArgs.from_hf_config(config)
