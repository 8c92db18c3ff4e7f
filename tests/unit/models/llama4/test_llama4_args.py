import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Llama4ForCausalLM, Llama4TextConfig

from torchtitan.config import JobConfig
from torchtitan.errors import CheckpointError, ConfigError
from torchtitan.models.llama4 import MODEL_CONFIGS, Llama4Model, Llama4ModelArgs
from torchtitan.models.llama4.model.args import MOE

TINY = Llama4ModelArgs(
    dim=32,
    n_layers=4,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    ffn_dim=48,
    moe=dataclasses.replace(MOE, num_experts=6, hidden_dim=24),
    moe_interval=2,
    chunk=24,
    vocab_size=40,
)
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


def grouped_mm_flops(rows, weights, *args, out_shape, **kwargs):
    """Not known to the flop counter: two operands of `[rows, in]`, `[experts, in, out]`, or two of
    `[in, rows]`, `[rows, out]`."""
    return 2 * rows[0] * rows[1] * weights[-1]


def parameters_of_transformers(args: Llama4ModelArgs) -> int:
    config = Llama4TextConfig(
        num_local_experts=args.num_experts, interleave_moe_layer_step=args.moe_interval
    )
    with torch.device("meta"):
        return sum(p.numel() for p in Llama4ForCausalLM(config).parameters())


@pytest.mark.parametrize("flavor", MODEL_CONFIGS)
def test_parameters_are_counted_exactly(flavor):
    args = MODEL_CONFIGS[flavor]
    with torch.device("meta"):
        model = Llama4Model(args)
    counted, _ = args.get_nparams_and_flops(seq_len=128)
    assert counted == sum(p.numel() for p in model.parameters())
    if flavor != "debugmodel":
        assert counted == parameters_of_transformers(args)


@pytest.mark.parametrize("tied", [False, True])
def test_flops_equal_those_counted_in_forward_and_backward(tied):
    args = dataclasses.replace(TINY, tie_word_embeddings=tied)
    tokens = torch.randint(args.vocab_size, (2, 24))
    model = Llama4Model(args)
    model.init_weights()
    mapping = {torch.ops.aten._grouped_mm: grouped_mm_flops}
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens).sum().backward()
    _, flops_per_token = args.get_nparams_and_flops(seq_len=24)
    assert counter.get_total_flops() == flops_per_token * tokens.numel()


def test_layers_that_attend_in_chunks_cost_as_much_as_on_a_chunk():
    _, on_a_chunk = TINY.get_nparams_and_flops(seq_len=24)
    _, on_more = TINY.get_nparams_and_flops(seq_len=120)
    assert on_more - on_a_chunk == 12 * 4 * 16 * (120 - 24)  # of the one layer that sees all


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"n_kv_heads \(3\) must divide n_heads \(8\)"):
        Llama4ModelArgs(n_heads=8, n_kv_heads=3)


def test_degrees_that_split_a_head_or_an_expert_are_refused():
    config = JobConfig()
    config.parallelism.tensor_parallel_degree = 4
    with pytest.raises(ConfigError, match=r"n_kv_heads = 2.*Degrees that do: 1, 2$"):
        TINY.update_from_config(config)
    config.parallelism.tensor_parallel_degree = 2
    TINY.update_from_config(config)
    config.parallelism.expert_tensor_parallel_degree = 2
    with pytest.raises(ConfigError, match=r"expert_tensor_parallel_degree.* cannot be split"):
        TINY.update_from_config(config)


def test_the_job_chooses_the_attention_kernel():
    config = JobConfig()
    config.model.attention = "sdpa"
    assert TINY.update_from_config(config).attention == "sdpa"
    assert TINY.attention == "auto", "a flavor was changed in place"


def test_a_published_config_gives_the_flavor():
    expected = MODEL_CONFIGS["109B-A17B"]
    moe = dataclasses.replace(expected.moe, aux_loss_weight=0.0)
    assert Llama4ModelArgs.from_hf_config(HF_CONFIG) == dataclasses.replace(expected, moe=moe)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
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
)
def test_a_config_of_another_architecture_is_refused(changes, message):
    with pytest.raises(CheckpointError, match=message):
        Llama4ModelArgs.from_hf_config(HF_CONFIG | changes)


@pytest.mark.parametrize("name", ["hidden_size", "rope_theta", "num_local_experts"])
def test_a_missing_field_is_named(name):
    config = {key: value for key, value in HF_CONFIG.items() if key != name}
    with pytest.raises(CheckpointError, match=f"config.json lacks '{name}'"):
        Llama4ModelArgs.from_hf_config(config)
