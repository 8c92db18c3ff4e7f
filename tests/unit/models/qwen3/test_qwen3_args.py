import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from torchtitan.config import JobConfig
from torchtitan.errors import CheckpointError, ConfigError
from torchtitan.models.common.moe import MoEArgs
from torchtitan.models.qwen3 import MODEL_CONFIGS, Qwen3Model, Qwen3ModelArgs

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
TINY = Qwen3ModelArgs(
    dim=32, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=48, vocab_size=40
)
TINY_MOE = dataclasses.replace(
    TINY, moe=MoEArgs(num_experts=6, top_k=2, hidden_dim=24, num_shared_experts=2)
)
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


def grouped_mm_flops(rows, weights, *args, out_shape, **kwargs):
    """Not known to the flop counter: two operands of `[rows, in]`, `[experts, in, out]`, or two of
    `[in, rows]`, `[rows, out]`."""
    return 2 * rows[0] * rows[1] * weights[-1]


@pytest.mark.parametrize("flavor", MODEL_CONFIGS)
def test_parameters_are_counted_exactly(flavor):
    args = MODEL_CONFIGS[flavor]
    with torch.device("meta"):
        model = Qwen3Model(args)
    counted, _ = args.get_nparams_and_flops(seq_len=128)
    assert counted == sum(p.numel() for p in model.parameters())
    assert counted == PUBLISHED_SIZES.get(flavor, counted)


@pytest.mark.parametrize("base", [TINY, TINY_MOE], ids=["dense", "experts"])
@pytest.mark.parametrize("tied", [False, True])
def test_flops_equal_those_counted_in_forward_and_backward(base, tied):
    args = dataclasses.replace(base, tie_word_embeddings=tied)
    tokens = torch.randint(args.vocab_size, (2, 24))
    model = Qwen3Model(args)
    model.init_weights()
    mapping = {torch.ops.aten._grouped_mm: grouped_mm_flops}
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens).sum().backward()
    _, flops_per_token = args.get_nparams_and_flops(seq_len=24)
    # Adding up what its experts made of a token is a product too, which the formula leaves out.
    adding_up = 6 * args.moe.top_k * args.dim * args.n_layers if args.moe else 0
    assert counter.get_total_flops() == (flops_per_token + adding_up) * tokens.numel()


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"n_kv_heads \(3\) must divide n_heads \(8\)"):
        Qwen3ModelArgs(n_heads=8, n_kv_heads=3)


def test_degrees_that_split_a_head_or_an_expert_are_refused():
    config = JobConfig()
    config.parallelism.tensor_parallel_degree = 4
    with pytest.raises(ConfigError, match=r"n_kv_heads = 2.*Degrees that do: 1, 2$"):
        TINY.update_from_config(config)
    config.parallelism.tensor_parallel_degree = 2
    TINY_MOE.update_from_config(config)
    config.parallelism.expert_tensor_parallel_degree = 2
    with pytest.raises(ConfigError, match=r"hidden_dim = 24.*Degrees that do: 1, 3$"):
        TINY_MOE.update_from_config(config)


def test_the_job_chooses_the_attention_kernel():
    config = JobConfig()
    config.model.attention = "sdpa"
    assert TINY.update_from_config(config).attention == "sdpa"
    assert TINY.attention == "auto", "a flavor was changed in place"


def test_a_published_config_gives_the_flavor():
    expected = MODEL_CONFIGS["30B-A3B"]
    moe = dataclasses.replace(expected.moe, aux_loss_weight=0.0)
    expected = dataclasses.replace(expected, moe=moe, ffn_dim=6144)
    assert Qwen3ModelArgs.from_hf_config(HF_CONFIG) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
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
)
def test_a_config_of_another_architecture_is_refused(changes, message):
    with pytest.raises(CheckpointError, match=message):
        Qwen3ModelArgs.from_hf_config(HF_CONFIG | changes)


@pytest.mark.parametrize("name", ["hidden_size", "rope_theta", "num_experts"])
def test_a_missing_field_is_named(name):
    config = {key: value for key, value in HF_CONFIG.items() if key != name}
    with pytest.raises(CheckpointError, match=f"config.json lacks '{name}'"):
        Qwen3ModelArgs.from_hf_config(config)
