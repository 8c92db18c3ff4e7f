import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from torchtitan.config import JobConfig
from torchtitan.distributed.context_parallel import apply_cp
from torchtitan.errors import CheckpointError, ConfigError
from torchtitan.models.gemma3 import MODEL_CONFIGS, Gemma3Model, Gemma3ModelArgs

PUBLISHED_SIZES = {  # of the larger ones, without the tower that reads images and its projection
    "270M": 268_098_176,
    "1B": 999_885_952,
    "4B": 4_300_079_472 - 416_866_032 - 1152 * (2560 + 1),
    "12B": 12_187_325_040 - 416_866_032 - 1152 * (3840 + 1),
    "27B": 27_432_406_640 - 416_866_032 - 1152 * (5376 + 1),
}
TINY = Gemma3ModelArgs(
    dim=32,
    n_layers=4,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    query_pre_attn_scalar=16,
    ffn_dim=48,
    sliding_window=24,
    full_attention_every=3,
    vocab_size=40,
)
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


@pytest.mark.parametrize("flavor", MODEL_CONFIGS)
def test_parameters_are_counted_exactly(flavor):
    args = MODEL_CONFIGS[flavor]
    with torch.device("meta"):
        model = Gemma3Model(args)
    counted, _ = args.get_nparams_and_flops(seq_len=128)
    assert counted == sum(p.numel() for p in model.parameters())
    assert counted == PUBLISHED_SIZES.get(flavor, counted)


@pytest.mark.parametrize("tied", [False, True])
def test_flops_equal_those_counted_in_forward_and_backward(tied):
    args = dataclasses.replace(TINY, tie_word_embeddings=tied)
    tokens = torch.randint(args.vocab_size, (2, 24))
    model = Gemma3Model(args)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens).sum().backward()
    _, flops_per_token = args.get_nparams_and_flops(seq_len=24)
    assert counter.get_total_flops() == flops_per_token * tokens.numel()


def test_layers_with_a_window_count_no_more_keys_than_it_has():
    _, within = TINY.get_nparams_and_flops(24)
    _, beyond = TINY.get_nparams_and_flops(24 + 10)
    assert beyond - within == 12 * TINY.n_heads * TINY.head_dim * 10  # one of four layers


def test_five_layers_have_a_window_and_the_sixth_has_none():
    args = MODEL_CONFIGS["1B"]
    full = [layer for layer in range(args.n_layers) if not args.has_window(layer)]
    assert full == [5, 11, 17, 23]


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"n_kv_heads \(3\) must divide n_heads \(8\)"):
        Gemma3ModelArgs(n_heads=8, n_kv_heads=3)


def test_a_degree_that_splits_a_head_is_refused():
    config = JobConfig()
    config.parallelism.tensor_parallel_degree = 4
    with pytest.raises(ConfigError, match=r"n_kv_heads = 2.*Degrees that do: 1, 2$"):
        TINY.update_from_config(config)


def test_a_ring_is_refused_since_it_computes_other_attention():
    config = JobConfig()
    config.model.name = "gemma3"
    config.parallelism.context_parallel_method = "ring"
    with torch.device("meta"):
        model = Gemma3Model(TINY)
    with pytest.raises(ConfigError, match=r"a ring knows.*gemma3 has layers with a scale or terms"):
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
    assert Gemma3ModelArgs.from_hf_config(HF_CONFIG) == MODEL_CONFIGS["1B"]


def test_linear_scaling_is_of_layers_without_a_window():
    scaling = {"factor": 8.0, "rope_type": "linear"}
    args = Gemma3ModelArgs.from_hf_config(HF_CONFIG | {"rope_scaling": scaling})
    assert args == dataclasses.replace(MODEL_CONFIGS["1B"], rope_factor=8.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
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
        ({"num_kv_shared_layers": 4}, r"unknown fields: num_kv_shared_layers = 4$"),
        ({"sliding_window": None}, r"sliding_window = None must be of type int"),
    ],
)
def test_a_config_of_another_architecture_is_refused(changes, message):
    with pytest.raises(CheckpointError, match=message):
        Gemma3ModelArgs.from_hf_config(HF_CONFIG | changes)


@pytest.mark.parametrize("name", ["hidden_size", "rope_theta", "rope_local_base_freq"])
def test_a_missing_field_is_named(name):
    config = {key: value for key, value in HF_CONFIG.items() if key != name}
    with pytest.raises(CheckpointError, match=f"config.json lacks '{name}'"):
        Gemma3ModelArgs.from_hf_config(config)
