"""Round to 8-bit numbers with scales, and multiply matrices of them.

Every scale is a power of two, the smallest that keeps the largest number of its group in range.
Dividing by it is exact, so a scale affects rounding only in where small numbers begin to lose
digits: below 2^-14 of the largest in e4m3. So it matters little which tokens or features a group
holds, and a model trains alike however they are divided among micro-batches and ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2
MX_BLOCK = 32
"""Elements that share a scale in MX formats (OCP Microscaling Formats v1.0)."""

Grouping = Literal["tensor", "row", "block"]
"""Elements that share a scale: a whole matrix, a row, or 32 neighbors in a row."""


@dataclass(frozen=True)
class Scaled:
    """The matrix `data * scale`, whose products sum over each row.

    data: `[..., rows, columns]`, float8.
    scale: float32, `[..., 1, 1]`, `[..., rows, 1]` or `[..., rows, columns / 32]`.
    """

    data: torch.Tensor
    scale: torch.Tensor
    grouping: Grouping

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Return `[..., rows, columns]`. Exact in bfloat16 and float32."""
        data = self.data.to(dtype)
        if self.grouping == "block":
            blocks = data.unflatten(-1, (-1, MX_BLOCK)) * self.scale[..., None].to(dtype)
            return blocks.flatten(start_dim=-2)
        return data * self.scale.to(dtype)


_STRIP = 128
"""Row elements that are reduced together in the first of two steps."""


def quantize(
    tensor: torch.Tensor,
    dtype: torch.dtype,
    grouping: Grouping,
    scale: torch.Tensor | None = None,
    strips: bool = False,
) -> Scaled:
    """Round `tensor` `[..., rows, columns]` to the nearest numbers of a float8 `dtype`.

    A group that holds infinity or NaN gets NaN.

    Args:
        scale: scale of this tensor, if already known. None: it is computed.
        strips: find the largest number of a row in two steps. In one step, the compiler fuses the
            search with the rounding. This is best if rows are contiguous in memory, but slow if
            `tensor` is a transpose or is rounded both ways.
    """
    values = tensor.float()
    if grouping == "block":
        values = values.unflatten(-1, (-1, MX_BLOCK))
    if scale is None:
        scale = power_of_two_scale(_largest(values, grouping, strips), dtype)
    data = (values / scale).to(dtype)
    if grouping == "block":
        return Scaled(data.flatten(start_dim=-2), scale.squeeze(-1), grouping)
    return Scaled(data, scale, grouping)


def _largest(values: torch.Tensor, grouping: Grouping, strips: bool) -> torch.Tensor:
    """Return the largest absolute value of each group."""
    sizes = values.abs()
    if grouping == "tensor":
        return sizes.amax(dim=(-2, -1), keepdim=True)
    if strips and grouping == "row" and values.size(-1) % _STRIP == 0:
        sizes = sizes.unflatten(-1, (-1, _STRIP)).amax(dim=-1)
    return sizes.amax(dim=-1, keepdim=True)


def power_of_two_scale(largest: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the smallest power of two that scales `largest` into `dtype`, float32 of its shape.

    At least 2^-126, the smallest normal number, which is also the scale of zeros.
    """
    bits = (largest / torch.finfo(dtype).max).view(torch.int32)
    # Round up to the next exponent, unless the mantissa is 0.
    power = ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return power.clamp(min=2.0**-126)


def scaled_mm(
    a: Scaled, b: Scaled, dtype: torch.dtype, emulate: bool, fast: bool = False
) -> torch.Tensor:
    """Return `a @ b.T`, summed in float32.

    Args:
        a: `[m, k]`.
        b: `[n, k]`; k and n are multiples of 16, and of 32 for MX.
        dtype: dtype of the result; bfloat16 without `emulate`.
        emulate: multiply dequantized numbers, on devices without float8 products.
        fast: let tensor cores accumulate in lower precision where that is faster (Hopper); not for
            MX.

    Returns:
        `[m, n]`.
    """
    if emulate:
        return a.dequantize(dtype) @ b.dequantize(dtype).T
    scale_a, scale_b = a.scale, b.scale.T
    if a.grouping == "block":
        scale_a, scale_b = _for_tensor_cores(a.scale), _for_tensor_cores(b.scale)
    elif a.grouping == "tensor":
        scale_a, scale_b = a.scale.view(()), b.scale.view(())
    return torch._scaled_mm(
        a.data.contiguous(),
        b.data.contiguous().T,
        scale_a=scale_a.contiguous(),
        scale_b=scale_b.contiguous(),
        out_dtype=dtype,
        use_fast_accum=fast and a.grouping != "block",
    )


def _for_tensor_cores(scale: torch.Tensor) -> torch.Tensor:
    """Return scales of MX blocks `[rows, columns]` in the order that Blackwell reads: flat, e8m0.

    The order is tiles of 128 x 4, one row of tiles after another. Within a tile, the scale of row r
    and column c is at 16 (r % 32) + 4 (r // 32) + c (cuBLAS 12.9, "1D Block Scaling Factors
    Layout").
    """
    rows, columns = scale.shape
    scale = F.pad(scale, (0, -columns % 4, 0, -rows % 128), value=1.0)
    tiles = scale.view(scale.size(0) // 128, 4, 32, scale.size(1) // 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1).to(torch.float8_e8m0fnu)


def scaled_grouped_mm(
    a: Scaled, b: Scaled, ends: torch.Tensor, dtype: torch.dtype, emulate: bool
) -> torch.Tensor:
    """Multiply each group's rows by its matrix: `a[start:end] @ b[group].T`.

    Args:
        a: `[rows, k]`, sorted by group.
        b: `[groups, n, k]`.
        ends: where each group's rows end, `[groups]` int32.
        dtype, emulate: as in `scaled_mm`; MX is only emulated.

    Returns:
        `[rows, n]`.
    """
    if emulate:
        return F.grouped_mm(a.dequantize(dtype), b.dequantize(dtype).mT, offs=ends)
    return torch._scaled_grouped_mm(
        a.data.contiguous(),
        b.data.contiguous().mT,
        a.scale.reshape(-1),
        b.scale.squeeze(-1),
        offs=ends,
        out_dtype=dtype,
    )
