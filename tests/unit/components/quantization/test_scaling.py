"""Rounding to 8 bits, and products of the results, against references by hand."""

from __future__ import annotations

import math

import pytest
import torch

from torchtitan.components.quantization.scaling import (
    E4M3,
    E5M2,
    MX_BLOCK,
    _for_tensor_cores,
    power_of_two_scale,
    quantize,
    scaled_grouped_mm,
    scaled_mm,
)

ROUNDING = {E4M3: 2.0**-4, E5M2: 2.0**-3}
"""Half of the distance of neighbouring numbers over their size: 3 and 2 digits after the first."""


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_a_scale_is_the_least_power_of_two_that_brings_the_largest_in_range(dtype):
    top = torch.finfo(dtype).max
    largest = torch.cat([normal(1000).abs() * 10.0 ** torch.arange(-20, 20).repeat(25)])
    scale = power_of_two_scale(largest, dtype)
    mantissa, _ = torch.frexp(scale)
    assert torch.equal(mantissa, torch.full_like(mantissa, 0.5))
    assert (largest / scale <= top).all()
    assert (largest / (scale / 2) > top).all()


def test_scales_at_the_edges():
    below, above = math.nextafter(448.0, 0), 448.0 + 2**-15
    largest = torch.tensor([448.0, below, above, 448.0 * 2**-30, 0.0])
    assert power_of_two_scale(largest, E4M3).tolist() == [1.0, 1.0, 2.0, 2**-30, 2**-126]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_group_that_is_not_finite_shows_it(bad):
    tensor = normal(2, 32)
    tensor[0, 3] = bad
    data = quantize(tensor, E4M3, "row").dequantize(torch.float32)
    assert data[0].isnan().any()
    assert data[1].isfinite().all()


def test_zeros_stay_zeros():
    for grouping in ("tensor", "row", "block"):
        result = quantize(torch.zeros(4, 64), E4M3, grouping).dequantize(torch.float32)
        assert torch.equal(result, torch.zeros(4, 64))


@pytest.mark.parametrize("grouping", ["tensor", "row", "block"])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_rounding_is_to_the_nearest(grouping, dtype):
    tensor = normal(64, 96)
    error = (quantize(tensor, dtype, grouping).dequantize(torch.float32) - tensor).abs()
    assert (error <= ROUNDING[dtype] * tensor.abs() + 1e-5).all()
    # Not only within the bound: somewhere it is nearly met, so no finer format was used.
    assert (error / tensor.abs()).max() > 0.8 * ROUNDING[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dequantizing_is_exact(dtype):
    for grouping in ("tensor", "row", "block"):
        scaled = quantize(normal(8, 64), E4M3, grouping)
        exact = scaled.dequantize(torch.float64)
        assert torch.equal(scaled.dequantize(dtype).double(), exact)


def test_the_groups():
    tensor = torch.ones(2, 2 * MX_BLOCK)
    tensor[0, 0], tensor[1, MX_BLOCK] = 448.0 * 4, 448.0 * 16
    assert quantize(tensor, E4M3, "tensor").scale.tolist() == [[16.0]]
    assert quantize(tensor, E4M3, "row").scale.tolist() == [[4.0], [16.0]]
    small = 2.0**-8  # 1 / 448 lies between 2^-9 and 2^-8
    assert quantize(tensor, E4M3, "block").scale.tolist() == [[4.0, small], [small, 16.0]]


def test_mx_blocks_against_a_loop():
    """By the definition: 32 elements over the scale's power of two, each to the nearest e4m3."""
    tensor = normal(3, 96) * torch.logspace(-6, 6, 96)
    scaled = quantize(tensor, E4M3, "block")
    for row in range(3):
        for block in range(3):
            values = [v.item() for v in tensor[row, block * 32 : (block + 1) * 32]]
            power = 2.0 ** math.ceil(math.log2(max(map(abs, values)) / 448))
            assert scaled.scale[row, block].item() == power
            data = scaled.data[row, block * 32 : (block + 1) * 32].float().tolist()
            assert data == [nearest_e4m3(v / power) for v in values]


def nearest_e4m3(value: float) -> float:
    """Ties to even; 2^-9 is the least number, and 2^-6 the least with all digits."""
    step = 2.0 ** (max(math.frexp(abs(value))[1] - 1, -6) - 3) if value else 1.0
    return round(value / step) * step


def test_a_scale_decides_nothing_about_rounding():
    """So it matters little which numbers share one; see the top of the module."""
    tensor = normal(64, 64)
    whole = quantize(tensor, E4M3, "tensor").dequantize(torch.float32)
    rows = quantize(tensor, E4M3, "row").dequantize(torch.float32)
    large = tensor.abs() > tensor.abs().max() * 2**-14
    assert torch.equal(whole[large], rows[large])


@pytest.mark.parametrize("grouping", ["tensor", "row"])
def test_emulated_products_are_pytorchs_own(grouping):
    """`torch._scaled_mm` runs on the CPU for these: the arguments are as it wants them."""
    a, b = (quantize(normal(32, 64, seed=i), E4M3, grouping) for i in (1, 2))
    emulated = scaled_mm(a, b, torch.bfloat16, emulate=True)
    try:
        real = scaled_mm(a, b, torch.bfloat16, emulate=False)
    except RuntimeError as error:
        if "only supports per-tensor scaling for CPU" in str(error):
            pytest.skip("torch 2.11 has no scales of rows on a CPU")
        raise
    torch.testing.assert_close(emulated, real, rtol=2**-8, atol=0)


def test_scales_in_the_order_of_tensor_cores():
    """Against cuBLAS's formula, for a matrix that does not fill its tiles."""
    rows, columns = 160, 6
    scale = 2.0 ** (torch.arange(rows * columns) % 200 - 100).view(rows, columns)
    flat = _for_tensor_cores(scale)
    assert flat.dtype == torch.float8_e8m0fnu
    assert flat.numel() == 256 * 8
    flat = flat.float()
    for row in range(rows):
        for column in range(columns):
            tile = row // 128 * 2 + column // 4
            within = row % 32 * 16 + row % 128 // 32 * 4 + column % 4
            assert flat[tile * 512 + within] == scale[row, column]


@pytest.mark.parametrize("grouping", ["row", "block"])
def test_grouped_products_are_the_products_of_the_groups(grouping):
    rows, matrices = normal(40, 64, seed=1), normal(3, 32, 64, seed=2)
    a, b = quantize(rows, E4M3, grouping), quantize(matrices, E4M3, grouping)
    ends = torch.tensor([16, 16, 40], dtype=torch.int32)  # the second group is empty
    out = scaled_grouped_mm(a, b, ends, torch.float32, emulate=True)
    for group, (start, end) in enumerate([(0, 16), (16, 16), (16, 40)]):
        one = quantize(rows[start:end], E4M3, grouping)
        expected = scaled_mm(one, quantize(matrices[group], E4M3, grouping), torch.float32, True)
        torch.testing.assert_close(out[start:end], expected)
