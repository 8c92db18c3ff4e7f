"""Norms in plans: what CUDA's kernel moves and keeps. tests/null_gpu has an allocator say so."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from torchtitan.planning.cuda_kernels import norm_of_cuda
from torchtitan.planning.memory import PeakMemory
from torchtitan.planning.operations import OperationRecorder
from torchtitan.runtime.fake_world import fake_world

ROWS, DIM = 64, 128


def kept_and_moved(dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that a norm and its backward pass keep in between, its output included, and move."""
    x = torch.randn(ROWS, DIM, dtype=dtype, requires_grad=True)
    weight = torch.ones(DIM, dtype=dtype, requires_grad=True)
    memory = PeakMemory()
    memory.add(x, weight)
    held = memory.current
    with memory, OperationRecorder() as recorder:
        out = F.rms_norm(x, (DIM,), weight, 1e-5)
        kept = memory.current - held
        out.backward(torch.ones_like(out))
    assert x.grad is not None and x.grad.dtype == dtype and weight.grad is not None
    return kept, sum(operation.moved * calls for operation, calls in recorder.operations.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_keeps_its_output_and_a_factor_a_row(dtype: torch.dtype) -> None:
    with norm_of_cuda():
        kept, moved = kept_and_moved(dtype)
    tensor = ROWS * DIM * dtype.itemsize
    assert kept == tensor + ROWS * 4
    # Read and written; then input and gradient read, and one written, beside the test's ones.
    assert 5 * tensor <= moved <= 8 * tensor
    _, moved_on_cpu = kept_and_moved(dtype)
    assert moved < moved_on_cpu


def test_a_weight_of_another_dtype_has_no_kernel() -> None:
    x, weight = torch.randn(ROWS, DIM), torch.ones(DIM, dtype=torch.bfloat16)
    expected = F.rms_norm(x, (DIM,), weight, 1e-5)
    with norm_of_cuda():
        assert torch.equal(F.rms_norm(x, (DIM,), weight, 1e-5), expected)


@pytest.mark.parametrize("placement", [Shard(1), Replicate()])
def test_so_it_does_under_tensor_parallelism(placement: Placement) -> None:
    """The gradient of the weight is a sum over the ranks if they have different tokens."""
    with fake_world(2, rank=0), norm_of_cuda(), PeakMemory() as memory:
        mesh = init_device_mesh("cpu", (2,))
        x = DTensor.from_local(torch.randn(1, ROWS, DIM), mesh, [placement]).requires_grad_()
        weight = DTensor.from_local(torch.ones(DIM), mesh, [Replicate()]).requires_grad_()
        held = memory.current
        out = F.rms_norm(x, (DIM,), weight, 1e-5)
        assert memory.current - held == (ROWS * DIM + ROWS) * 4
        out.backward(torch.ones_like(out))
    assert isinstance(weight.grad, DTensor) and isinstance(out, DTensor)
    assert weight.grad.placements[0].is_partial() == placement.is_shard()
    assert out.placements == (placement,)
