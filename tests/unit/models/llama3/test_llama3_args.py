import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from torchtitan.config import JobConfig
from torchtitan.errors import ConfigError
from torchtitan.models.llama3 import MODEL_CONFIGS, Llama3Model, Llama3ModelArgs

PUBLISHED_SIZES = {
    "1B": 1_235_814_400,
    "3B": 3_212_749_824,
    "8B": 8_030_261_248,
    "70B": 70_553_706_496,
    "405B": 405_853_388_800,
}
TINY = Llama3ModelArgs(dim=32, n_layers=3, n_heads=4, n_kv_heads=2, ffn_dim=48, vocab_size=40)


@pytest.mark.parametrize("flavor", MODEL_CONFIGS)
def test_parameters_are_counted_exactly(flavor):
    args = MODEL_CONFIGS[flavor]
    with torch.device("meta"):
        model = Llama3Model(args)
    counted, _ = args.get_nparams_and_flops(seq_len=128)
    assert counted == sum(p.numel() for p in model.parameters())
    assert counted == PUBLISHED_SIZES.get(flavor, counted)


@pytest.mark.parametrize("tied", [False, True])
def test_flops_equal_those_counted_in_forward_and_backward(tied):
    args = dataclasses.replace(TINY, tie_word_embeddings=tied)
    tokens = torch.randint(args.vocab_size, (2, 24))
    model = Llama3Model(args)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens).sum().backward()
    _, flops_per_token = args.get_nparams_and_flops(seq_len=24)
    assert counter.get_total_flops() == flops_per_token * tokens.numel()


@pytest.mark.parametrize(("heads", "kv_heads"), [(5, 5), (8, 3)])
def test_heads_that_do_not_divide_are_refused(heads, kv_heads):
    with pytest.raises(ValueError, match=f"n_kv_heads \\({kv_heads}\\) must divide"):
        Llama3ModelArgs(dim=32, n_heads=heads, n_kv_heads=kv_heads)


def test_the_job_chooses_the_attention_kernel():
    config = JobConfig()
    config.model.attention = "sdpa"
    assert TINY.update_from_config(config).attention == "sdpa"
    assert TINY.attention == "auto", "a flavor was changed in place"


def test_a_tensor_parallel_degree_that_splits_a_head_is_refused():
    config = JobConfig()
    config.parallelism.tensor_parallel_degree = 4
    with pytest.raises(ConfigError, match=r"n_kv_heads = 2.*Degrees that do: 1, 2$"):
        TINY.update_from_config(config)


def test_a_ulysses_degree_that_splits_a_head_is_refused():
    config = JobConfig()
    config.parallelism.tensor_parallel_degree = 2
    config.parallelism.context_parallel_degree = 4
    TINY.update_from_config(config)
    config.parallelism.context_parallel_method = "ulysses"
    with pytest.raises(ConfigError, match=r"a rank has 2 of them .*Degrees .* these: 1, 2\. The"):
        TINY.update_from_config(config)
    config.parallelism.context_parallel_degree = 2  # its one key and value head is repeated
    TINY.update_from_config(config)
