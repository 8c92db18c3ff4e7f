import math

import pytest
import torch

from torchtitan.models.common.rope import RopeScaling, rope_frequencies, rotation


def test_pairs_turn_by_their_frequency_times_the_position():
    frequencies = rope_frequencies(head_dim=4, theta=100.0)
    torch.testing.assert_close(frequencies, torch.tensor([1.0, 0.1]))

    x = torch.tensor([1.0, 1.0, 0.0, 0.0]).view(1, 1, 1, 4)  # each pair (i, i + 2) is (1, 0)
    turned = rotation(torch.tensor([[3]]), frequencies)(x).flatten()
    expected = [math.cos(3.0), math.cos(0.3), math.sin(3.0), math.sin(0.3)]
    torch.testing.assert_close(turned, torch.tensor(expected))


def test_scores_depend_on_the_distance_alone():
    torch.manual_seed(0)
    frequencies = rope_frequencies(head_dim=16, theta=10000.0)
    q, k = torch.randn(2, 1, 1, 1, 16)

    def score(q_position: int, k_position: int) -> torch.Tensor:
        turned_q = rotation(torch.tensor([[q_position]]), frequencies)(q)
        turned_k = rotation(torch.tensor([[k_position]]), frequencies)(k)
        return (turned_q * turned_k).sum()

    torch.testing.assert_close(score(7, 3), score(104, 100), atol=1e-4, rtol=1e-4)
    assert not torch.isclose(score(7, 3), score(7, 4))


def test_scaling_keeps_fast_rotations_slows_slow_ones_and_is_gradual_between():
    scaling = RopeScaling(factor=8.0, original_max_seq_len=8192)
    plain = rope_frequencies(128, 500000.0)
    scaled = scaling.frequencies(128, 500000.0)
    wavelengths = 2 * math.pi / plain
    fast, slow = wavelengths < 8192 / 4, wavelengths > 8192 / 1
    between = ~fast & ~slow

    assert torch.equal(scaled[fast], plain[fast])
    torch.testing.assert_close(scaled[slow], plain[slow] / 8)
    assert fast.any() and slow.any() and between.any()
    assert (scaled[between] < plain[between]).all()
    assert (scaled[between] > plain[between] / 8).all()
    assert (scaled.diff() < 0).all()


def test_bfloat16_heads_are_rotated_in_float32():
    x = torch.randn(1, 8, 2, 16, dtype=torch.bfloat16)
    rotate = rotation(torch.arange(100_000, 100_008)[None], rope_frequencies(16, 10000.0))
    assert rotate.cos.dtype == torch.float32
    turned = rotate(x)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate(x.float()).bfloat16())


def test_interleaved_pairs_are_a_permutation_of_halves():
    torch.manual_seed(0)
    x, positions = torch.randn(1, 8, 2, 16), torch.arange(8)[None]
    frequencies = rope_frequencies(16, 10000.0)
    order = torch.cat([torch.arange(0, 16, 2), torch.arange(1, 16, 2)])
    interleaved = rotation(positions, frequencies, interleaved=True)(x)
    halves = rotation(positions, frequencies)(x[..., order])
    torch.testing.assert_close(interleaved[..., order], halves)


@pytest.mark.parametrize("interleaved", [False, True])
def test_compiled_and_backwards_it_is_the_same_rotation(interleaved: bool):
    torch.manual_seed(0)
    frequencies = rope_frequencies(16, 10000.0)
    rotate = rotation(torch.arange(8)[None], frequencies, interleaved, factor=1.5)
    x, weight = torch.randn(2, 1, 8, 2, 16)
    results = []
    for function in (rotate, torch.compile(rotate.__call__, backend="eager")):
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        results.append([out, *torch.autograd.grad(out, leaf, weight)])
    torch.testing.assert_close(*results)
    # A rotation keeps products, and the gradient is that of the product with `weight`.
    out, grad = results[0]
    torch.testing.assert_close((grad * grad).sum(), 1.5**2 * (weight * weight).sum())
    torch.testing.assert_close((grad * x).sum(), (out * weight).sum())


def test_a_factor_multiplies_what_is_rotated():
    x, positions = torch.randn(1, 8, 2, 16), torch.arange(8)[None]
    frequencies = rope_frequencies(16, 10000.0)
    plain, grown = rotation(positions, frequencies), rotation(positions, frequencies, factor=1.5)
    torch.testing.assert_close(grown(x), 1.5 * plain(x))
