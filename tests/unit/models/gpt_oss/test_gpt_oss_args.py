import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from torchtitan.config import JobConfig
from torchtitan.distributed.context_parallel import apply_cp
from torchtitan.errors import CheckpointError, ConfigError
from torchtitan.models.common.moe import MoEArgs
from torchtitan.models.common.sink_attention import SINK_FEATURES
from torchtitan.models.gpt_oss import MODEL_CONFIGS, GptOssModel, GptOssModelArgs

PUBLISHED_SIZES = {"20B": 20_914_757_184, "120B": 116_829_156_672}
TINY = GptOssModelArgs(
    dim=32,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    sliding_window=24,
    moe=MoEArgs(num_experts=6, top_k=2, hidden_dim=24, gate_bias=True),
    vocab_size=40,
)
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


def grouped_mm_flops(rows, weights, *args, out_shape, **kwargs):
    """Not known to the flop counter: two operands of `[rows, in]`, `[experts, in, out]`, or two of
    `[in, rows]`, `[rows, out]`."""
    return 2 * rows[0] * rows[1] * weights[-1]


@pytest.mark.parametrize("flavor", MODEL_CONFIGS)
def test_parameters_are_counted_exactly(flavor):
    args = MODEL_CONFIGS[flavor]
    with torch.device("meta"):
        model = GptOssModel(args)
    counted, _ = args.get_nparams_and_flops(seq_len=128)
    assert counted == sum(p.numel() for p in model.parameters())
    assert counted == PUBLISHED_SIZES.get(flavor, counted)


@pytest.mark.parametrize("tied", [False, True])
def test_flops_equal_those_counted_in_forward_and_backward(tied):
    args, seq_len = dataclasses.replace(TINY, tie_word_embeddings=tied), 24
    tokens = torch.randint(args.vocab_size, (2, seq_len))
    model = GptOssModel(args)
    model.init_weights()
    mapping = {torch.ops.aten._grouped_mm: grouped_mm_flops}
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens).sum().backward()
    _, flops_per_token = args.get_nparams_and_flops(seq_len)
    # What the formula leaves out: products that add up, what experts made of a token and, with 8
    # rows of ones, the gradients of their biases; and the sink's key and features.
    adding_up = args.moe.top_k * (6 * args.dim + 2 * 8 * (args.dim + 2 * args.moe.hidden_dim))
    sinks = (seq_len + 1) * (args.head_dim + SINK_FEATURES) - seq_len * args.head_dim
    flops_per_token += args.n_layers * (adding_up + 12 * args.n_heads * sinks)
    assert counter.get_total_flops() == flops_per_token * tokens.numel()


def test_layers_with_a_window_count_no_more_keys_than_it_has():
    _, within = TINY.get_nparams_and_flops(24)
    _, beyond = TINY.get_nparams_and_flops(24 + 10)
    assert beyond - within == 12 * TINY.n_heads * TINY.head_dim * 10  # one of three layers


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"n_kv_heads \(3\) must divide n_heads \(8\)"):
        GptOssModelArgs(n_heads=8, n_kv_heads=3)


def test_degrees_that_split_a_head_or_an_expert_are_refused():
    config = JobConfig()
    config.parallelism.tensor_parallel_degree = 4
    with pytest.raises(ConfigError, match=r"n_kv_heads = 2.*Degrees that do: 1, 2$"):
        TINY.update_from_config(config)
    config.parallelism.tensor_parallel_degree = 2
    TINY.update_from_config(config)
    config.parallelism.expert_tensor_parallel_degree = 2
    with pytest.raises(ConfigError, match=r"expert_tensor_parallel_degree = 2.*output biases"):
        TINY.update_from_config(config)


def test_a_ring_is_refused_since_it_computes_other_attention():
    config = JobConfig()
    config.model.name = "gpt_oss"
    config.parallelism.context_parallel_method = "ring"
    with torch.device("meta"):
        model = GptOssModel(TINY)
    with pytest.raises(
        ConfigError, match=r"a ring knows.*gpt_oss has layers with a scale or terms"
    ):
        apply_cp(model, None, config)


def test_ulysses_needs_heads_for_every_rank():
    config = JobConfig()
    config.parallelism.context_parallel_method = "ulysses"
    config.parallelism.context_parallel_degree = 8
    with pytest.raises(ConfigError, match=r"n_heads = 4.*Degrees that divide these: 1, 2, 4"):
        TINY.update_from_config(config)


def test_the_job_chooses_the_attention_kernel():
    config = JobConfig()
    config.model.attention = "sdpa"
    assert TINY.update_from_config(config).attention == "sdpa"
    assert TINY.attention == "auto", "a flavor was changed in place"


def test_a_published_config_gives_the_flavor():
    expected = MODEL_CONFIGS["20B"]
    moe = dataclasses.replace(expected.moe, aux_loss_weight=0.0)
    assert GptOssModelArgs.from_hf_config(HF_CONFIG) == dataclasses.replace(expected, moe=moe)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, r"model_type is 'llama', not 'gpt_oss'"),
        ({"attention_bias": False}, r"attention_bias = False is not supported"),
        ({"hidden_act": "gelu"}, r"hidden_act = 'gelu' is not supported"),
        ({"swiglu_alpha": 1.0}, r"swiglu_alpha = 1.0 is not supported"),
        ({"layer_types": ["full_attention"] * 24}, r"layer_types = .* is not supported"),
        ({"rope_scaling": None}, r"rope_scaling = None is not supported"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, r"rope_scaling = .*linear"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, r"quantization_config .*dequantize"),
        ({"num_nextn_predict_layers": 4}, r"unknown fields: num_nextn_predict_layers = 4$"),
        ({"sliding_window": None}, r"sliding_window = None must be of type int"),
        ({"intermediate_size": 100}, r"hidden_dim \(100\) must be a multiple of 8"),
    ],
)
def test_a_config_of_another_architecture_is_refused(changes, message):
    with pytest.raises(CheckpointError, match=message):
        GptOssModelArgs.from_hf_config(HF_CONFIG | changes)


@pytest.mark.parametrize("name", ["hidden_size", "rope_theta", "num_local_experts"])
def test_a_missing_field_is_named(name):
    config = {key: value for key, value in HF_CONFIG.items() if key != name}
    with pytest.raises(CheckpointError, match=f"config.json lacks '{name}'"):
        GptOssModelArgs.from_hf_config(config)
