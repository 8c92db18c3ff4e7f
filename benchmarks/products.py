"""Measures single parts of a step: float8 and experts against bf16 products, and the optimizer.

On a GPU at the sizes of Llama 3 3B (dim 3072, feed-forward 8192); on a CPU at tiny sizes, only to
check that it runs: there float8 is emulated, and its speed means nothing.

    python -m benchmarks.products
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F

from benchmarks.report import Spread, Table, verdict
from torchtitan.components.quantization.products import quantized_linear

TARGET_FLOAT8 = 1.25
TARGET_GROUPED = 0.6
TARGET_OPTIMIZER = 0.8
ROUNDS, CALLS = 5, 10


def _seconds(call: Callable[[], object], cuda: bool) -> float:
    """Return the median of some calls. On a GPU they are queued, to exclude the host's time."""
    if cuda:
        return _seconds_on_gpu(call)
    times = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _seconds_on_gpu(call: Callable[[], object]) -> float:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(CALLS + 1)]
    call()  # the host runs ahead
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) / 1e3 for a, b in pairwise(marks))


def _ratio(ours: Callable[[], object], base: Callable[[], object], cuda: bool) -> Spread:
    """Return base seconds over ours, by turns, after one call of each, which may compile."""
    ours(), base()
    return Spread.of([_seconds(base, cuda) / _seconds(ours, cuda) for _ in range(ROUNDS)])


def _with_backward(forward: Callable[..., torch.Tensor], *leaves: torch.Tensor) -> Callable:
    grad = torch.randn_like(forward(*leaves))

    def call() -> None:
        torch.autograd.grad(forward(*leaves), leaves, grad)

    return call


def float8_rows(device: str, tokens: int, dim: int, hidden: int) -> list[list[str]]:
    """Measure a linear layer with its quantization, forward and backward, compiled on a GPU."""
    cuda = device == "cuda"
    x, weight = (
        torch.randn(size, dim, device=device, dtype=torch.bfloat16, requires_grad=True)
        for size in (tokens, hidden)
    )
    rows = []
    for name, grouping in {"tensorwise": "tensor", "rowwise": "row"}.items():

        def float8(x: torch.Tensor, weight: torch.Tensor, group: str = grouping) -> torch.Tensor:
            return quantized_linear(x, weight, group, emulate=not cuda)

        ours = torch.compile(float8) if cuda else float8
        ratio = _ratio(_with_backward(ours, x, weight), _with_backward(F.linear, x, weight), cuda)
        rows.append(_row(f"float8 linear, {name}, over bf16", ratio, TARGET_FLOAT8, cuda))
    return rows


def grouped_row(device: str, tokens: int, dim: int, hidden: int, experts: int) -> list[str]:
    """Compare products of unevenly loaded experts with one dense product of the same FLOPs."""
    cuda = device == "cuda"
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(experts, (tokens,), generator=generator).square() // experts
    ends = chosen.bincount(minlength=experts).cumsum(0).to(device, torch.int32)
    rows = torch.randn(tokens, dim, device=device, dtype=torch.bfloat16, requires_grad=True)
    dense = torch.randn(hidden, dim, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = dense.detach().repeat(experts, 1, 1).requires_grad_()

    def grouped(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.grouped_mm(rows, weight.mT, offs=ends)

    ratio = _ratio(
        _with_backward(grouped, rows, weight), _with_backward(F.linear, rows, dense), cuda
    )
    return _row(f"grouped products of {experts} experts, over dense", ratio, TARGET_GROUPED, cuda)


def optimizer_row(device: str, numel: int) -> list[str]:
    """Compare fused AdamW with a copy of the same bytes: 4 read and 3 written per number."""
    cuda = device == "cuda"
    params = [torch.randn(numel // 16, device=device, requires_grad=True) for _ in range(16)]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = torch.optim.AdamW(params, fused=True)
    source = torch.randn(numel * 7 // 2, device=device)
    target = torch.empty_like(source)
    ratio = _ratio(optimizer.step, lambda: target.copy_(source), cuda)
    return _row("fused AdamW, over a copy of as many bytes", ratio, TARGET_OPTIMIZER, cuda)


def _row(name: str, ratio: Spread, target: float, cuda: bool) -> list[str]:
    return [name, str(ratio), verdict(ratio.median, at_least=target) if cuda else "open: no GPU"]


def run(quick: bool = False) -> list[Table]:
    device = "cuda" if torch.cuda.is_available() and not quick else "cpu"
    large = device == "cuda"
    tokens, dim, hidden = (16384, 3072, 8192) if large else (64, 64, 128)
    rows = float8_rows(device, tokens, dim, hidden)
    rows.append(grouped_row(device, tokens, dim, hidden // 4 if large else 64, 32 if large else 4))
    rows.append(optimizer_row(device, 2**28 if large else 2**14))
    note = f"Speed as a ratio, median (lowest to highest) of {ROUNDS} rounds by turns, on {device}."
    return [Table("Products and the optimizer", ["what", "ratio", "target"], rows, note)]


if __name__ == "__main__":
    sys.stdout.write("".join(table.markdown() for table in run()))
