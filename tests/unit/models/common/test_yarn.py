import math

import pytest
import torch

from torchtitan.errors import CheckpointError
from torchtitan.models.common.rope import rope_frequencies
from torchtitan.models.common.scaled_rope import scaling_from_hf
from torchtitan.models.common.yarn import YarnScaling

HF = {"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}


def test_it_keeps_fast_rotations_slows_slow_ones_and_is_gradual_between():
    scaling = YarnScaling(factor=40.0, original_max_seq_len=4096)
    plain, scaled = rope_frequencies(64, 10000.0), scaling.frequencies(64, 10000.0)
    # Of 32 pairs, those that turn 32 times and once in 4096 tokens are the 10.5th and 22.5th.
    assert torch.equal(scaled[:11], plain[:11])
    torch.testing.assert_close(scaled[23:], plain[23:] / 40)
    assert (scaled.diff() < 0).all()
    kept = (scaled / plain - 1 / 40) / (1 - 1 / 40)
    torch.testing.assert_close(kept[10:24], 1 - torch.arange(14) / 13)


@pytest.mark.parametrize(
    ("context", "first", "last"),
    # Of pairs 0 to 31, the 20.1st turns 32 times, and a 32.1st would turn once. In a short context
    # not even pair 0 turns 32 times.
    [(65536, 20, 33), (128, 0, 11)],
)
def test_the_change_may_reach_beyond_the_pairs(context: int, first: int, last: int):
    scaling = YarnScaling(factor=40.0, original_max_seq_len=context)
    ratio = scaling.frequencies(64, 10000.0) / rope_frequencies(64, 10000.0)
    kept = (ratio - 1 / 40) / (1 - 1 / 40)
    expected = (1 - (torch.arange(32) - first) / (last - first)).clamp(0, 1)
    torch.testing.assert_close(kept, expected, rtol=1e-4, atol=1e-6)


def test_without_truncation_the_change_begins_within_a_pair():
    scaling = YarnScaling(factor=40.0, original_max_seq_len=4096, truncate=False)
    kept = scaling.frequencies(64, 10000.0) / rope_frequencies(64, 10000.0)
    first, last = (32 * math.log(4096 / (2 * math.pi * n)) / math.log(10000.0) for n in (32, 1))
    expected = 1 - (11 - first) / (last - first) * (1 - 1 / 40)
    assert kept[11].item() == pytest.approx(expected, rel=1e-5)


def test_scores_grow_by_the_logarithm_of_the_factor():
    paper = YarnScaling(factor=40.0)
    assert paper.rotation_factor == pytest.approx(1 + 0.1 * math.log(40))
    assert paper.score_factor == 1
    deepseek = YarnScaling(factor=40.0, mscale=0.707, mscale_all_dim=0.707)
    assert deepseek.rotation_factor == 1
    assert deepseek.score_factor == pytest.approx((1 + 0.0707 * math.log(40)) ** 2)


def test_it_is_read_from_a_config():
    def read(**changes):
        return scaling_from_hf(HF | changes, YarnScaling)

    assert read() == YarnScaling(factor=40.0, original_max_seq_len=4096)
    assert read(mscale=0.5, mscale_all_dim=0.7, beta_fast=16) == (
        YarnScaling(mscale=0.5, mscale_all_dim=0.7, beta_fast=16.0)
    )
    assert read(truncate=False, beta_slow=None) == YarnScaling(truncate=False)


@pytest.mark.parametrize(
    "changes",
    [{"rope_type": "linear"}, {"factor": None}, {"mscale": 0.7}, {"attention_factor": 1.2}],
)
def test_what_is_not_supported_is_refused(changes):
    with pytest.raises(CheckpointError, match=r"rope_scaling = .* is not supported"):
        scaling_from_hf(HF | changes, YarnScaling)


@pytest.mark.parametrize("changes", [{"factor": "40"}, {"beta_fast": True}])
def test_what_is_no_number_is_refused(changes):
    with pytest.raises(CheckpointError, match=r"rope_scaling: \w+ = .* must be a number"):
        scaling_from_hf(HF | changes, YarnScaling)
