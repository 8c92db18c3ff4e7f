"""What context parallelism refuses; that it computes the right thing is in tests/distributed."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode

from torchtitan.config import JobConfig
from torchtitan.distributed.context_parallel import apply_cp, require_applied_cp, sequence_shards
from torchtitan.distributed.sequence_shards import SequenceShards
from torchtitan.errors import ConfigError, ContextParallelError
from torchtitan.models.common.attention import CausalMask, ScaledDotProductAttention

MESH = SimpleNamespace(get_local_rank=lambda: 1, size=lambda: 2)


def model(*modules: nn.Module) -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleDict({str(i): module for i, module in enumerate(modules)})
    return model


@pytest.fixture
def config():
    config = JobConfig()
    config.parallelism.context_parallel_degree = 2
    return config


@pytest.mark.parametrize("part", [ScaledDotProductAttention(), CausalMask(), nn.Linear(2, 2)])
def test_a_model_with_attention_of_its_own_is_refused(part, config):
    with pytest.raises(ConfigError, match="_degree = 2: llama3 does not use CausalMask"):
        apply_cp(model(part), MESH, config)


@pytest.mark.parametrize(
    "mixer", [nn.Conv1d(2, 2, 4, groups=2), nn.RNN(2, 2), nn.LSTM(2, 2), nn.GRU(2, 2)]
)
def test_a_model_that_mixes_tokens_by_other_means_is_refused(mixer, config):
    hybrid = model(CausalMask(), ScaledDotProductAttention(), mixer)
    with pytest.raises(ConfigError, match=r"_degree = 2: llama3 mixes tokens in layers\.2, which"):
        apply_cp(hybrid, MESH, config)


def test_layers_without_attention_may_mix_tokens_by_means_of_their_own(config, caplog):
    mask, attention = CausalMask(), ScaledDotProductAttention()
    apply_cp(model(nn.Sequential(mask, attention)), MESH, config)
    assert not caplog.records
    apply_cp(model(nn.Sequential(mask, attention), nn.Linear(2, 2)), MESH, config)
    [record] = caplog.records
    assert "has no ScaledDotProductAttention in layers.1. If they mix tokens" in record.message


@pytest.mark.parametrize("attention", [[CausalMask(), ScaledDotProductAttention()], []])
def test_a_layer_may_exchange_by_itself(attention, config, caplog):
    """Also where no layer has attention, as in a stage of a pipeline."""
    mixer = nn.Linear(2, 2)
    mixer.shards = sequence_shards(MESH, config)
    hybrid = model(*([nn.Sequential(*attention)] if attention else []), mixer)
    apply_cp(hybrid, MESH, config)
    assert not caplog.records
    del mixer.shards
    with pytest.raises(ConfigError, match="does not use CausalMask"):
        apply_cp(model(mixer), MESH, config)


class Exchanging(nn.Conv1d):
    """Gets the tokens of the other ranks by itself."""


@pytest.mark.parametrize("convolution", [nn.Conv1d(2, 2, 1), Exchanging(2, 2, 4)])
def test_a_convolution_of_single_tokens_or_of_an_author_is_fine(convolution, config):
    apply_cp(model(CausalMask(), ScaledDotProductAttention(), convolution), MESH, config)


def test_a_pipeline_stage_without_layers_is_fine(config):
    stage = model()
    stage.mask = CausalMask()
    apply_cp(stage, MESH, config)
    require_applied_cp([stage], config)


@pytest.mark.parametrize("limit", ["window", "chunk"])
def test_a_ring_refuses_layers_that_are_not_plain_causal(limit, config):
    config.parallelism.context_parallel_method = "ring"
    limited = model(CausalMask(**{limit: 8}), ScaledDotProductAttention())
    with pytest.raises(ConfigError, match=r"_method = \"ring\": .*Use 'allgather' or 'ulysses'"):
        apply_cp(limited, MESH, config)


def test_a_ring_refuses_a_mask_by_another_rule(config):
    """The ring would attend causally, whatever the mask says."""

    class WholeMask(CausalMask):
        pass

    whole = model(WholeMask(), ScaledDotProductAttention())
    whole.sees_later_tokens = True
    apply_cp(whole, MESH, config)
    config.parallelism.context_parallel_method = "ring"
    with pytest.raises(ConfigError, match=r"or by a mask of its own\. Use 'allgather'"):
        apply_cp(model(WholeMask(), ScaledDotProductAttention()), MESH, config)


def test_a_ring_refuses_a_mask_that_a_layer_is_given(config, monkeypatch):
    monkeypatch.setattr(MESH, "get_group", lambda: SimpleNamespace(group_name=""), raising=False)
    config.training.seq_len, config.parallelism.context_parallel_method = 8, "ring"
    monkeypatch.setattr(SequenceShards, "gather", lambda self, part, dim: part.repeat(1, 2))
    mask, attention, ones = CausalMask(), ScaledDotProductAttention(), torch.ones(1, 1, 4, 4)
    apply_cp(model(mask, attention), MESH, config)
    cpu = torch.device("cpu")
    assert mask(4, None, cpu) is None
    for given in ones.bool(), mask(4, torch.zeros(1, 4, dtype=torch.int64), cpu):
        with pytest.raises(ContextParallelError, match=r"'ring': .* a layer has a mask of its own"):
            attention(ones, ones, ones, given)


@pytest.mark.parametrize("size, dtype", [(12, torch.bfloat16), (8, torch.float32)])
def test_a_ring_refuses_heads_that_the_flash_kernel_does_not_take(size, dtype, config, monkeypatch):
    monkeypatch.setattr(MESH, "get_group", lambda: SimpleNamespace(group_name=""), raising=False)
    config.training.seq_len, config.parallelism.context_parallel_method = 8, "ring"
    attention = ScaledDotProductAttention()
    apply_cp(model(CausalMask(), attention), MESH, config)
    with FakeTensorMode():
        heads = torch.ones(1, 1, 4, size, dtype=dtype, device="cuda")
    with pytest.raises(
        ContextParallelError, match=rf"heads of .* are of {size} in {dtype}\. Use 'a"
    ):
        attention(heads, heads, heads)


def test_attention_to_all_keys_needs_no_mask_and_no_ring(config):
    attention = ScaledDotProductAttention(causal=False)
    apply_cp(model(attention), MESH, config)
    config.parallelism.context_parallel_method = "ring"
    with pytest.raises(ConfigError, match=r"has layers that attend in .* to later tokens"):
        apply_cp(model(attention), MESH, config)


def test_a_model_that_sees_later_tokens_by_a_subclass_is_refused(config):
    """Ranks would leave out the keys that a causal query does not see."""
    encoder = model(CausalMask(), OtherAttention())
    encoder.sees_later_tokens = True
    with pytest.raises(ConfigError, match=r"use ScaledDotProductAttention\(causal=F"):
        apply_cp(encoder, MESH, config)


class OtherAttention(ScaledDotProductAttention):
    """Adds something to the scores."""


@pytest.mark.parametrize("attention", [ScaledDotProductAttention(scale=0.1), OtherAttention()])
def test_a_ring_refuses_attention_that_its_kernels_do_not_compute(attention, config):
    apply_cp(model(CausalMask(), attention), MESH, config)
    config.parallelism.context_parallel_method = "ring"
    with pytest.raises(ConfigError, match="ring attention supports only scaled dot product"):
        apply_cp(model(CausalMask(), attention), MESH, config)


def test_a_model_whose_attention_was_not_shared_is_refused(config):
    parts = [model(CausalMask(), ScaledDotProductAttention()) for _ in range(2)]
    apply_cp(parts[0], MESH, config)
    with pytest.raises(ConfigError, match="parallelize_fn of llama3 does not support context"):
        require_applied_cp(parts, config)
    apply_cp(parts[1], MESH, config)
    require_applied_cp(parts, config)


@pytest.mark.parametrize("tokens", [10, 4], ids=["a prefix", "blocks"])
def test_a_model_that_attends_to_other_tokens_than_its_part_is_refused_in_training(tokens, config):
    config.training.seq_len = 16
    mask, attend = CausalMask(), ScaledDotProductAttention()
    apply_cp(model(mask, attend), MESH, config)
    message = f"llama3 attends to {tokens} tokens where a rank has a part of 8"
    cpu, part, other = torch.device("cpu"), torch.ones(1, 1, 8, 2), torch.ones(1, 1, tokens, 2)
    mask(8, None, cpu)
    for attended in (
        lambda: mask(tokens, None, cpu),
        lambda: attend(other, other, other),
        lambda: attend(part, other, other),
    ):
        with pytest.raises(ConfigError, match=message):
            attended()
    mask.eval()(tokens, None, cpu)  # of sequences of another length


def test_a_model_states_the_lengths_that_its_attention_sees(config):
    config.training.seq_len = 16
    part, joined = torch.ones(1, 1, 8, 2), torch.ones(1, 1, 12, 2)
    attend = ScaledDotProductAttention(causal=False)
    apply_cp(model(attend), MESH, config, [16])
    with pytest.raises(ContextParallelError, match="12 tokens where a rank has a part of 8"):
        attend(joined, part, part)
    attend = ScaledDotProductAttention(causal=False)
    apply_cp(model(attend), MESH, config, [24, 32])
    with pytest.raises(ContextParallelError, match="8 tokens where a rank has a part of 12 or 16"):
        attend(part, part, part)
