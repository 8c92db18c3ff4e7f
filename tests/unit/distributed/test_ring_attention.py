"""The kernels of a ring, and its sums; a ring of processes is in tests/distributed."""

from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan.distributed import ring_attention as ring
from torchtitan.distributed.ring_attention import (
    _flash,
    _flash_backward,
    _merge,
    ring_attention,
)
from torchtitan.distributed.sequence_shards import SequenceShards
from torchtitan.runtime.fake_world import fake_world


def heads(device: str, dtype: torch.dtype, keys: int) -> tuple[torch.Tensor, ...]:
    q = torch.randn(2, 8, 32, 16, device=device, dtype=dtype)
    k, v = torch.randn(2, 2, 2, keys, 16, device=device, dtype=dtype).unbind()
    return q, k, v


class Arguments(TorchDispatchMode):
    """Keeps the arguments of attention kernels, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.of_kernels: list[dict[str, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "flash_attention" in func.name():
            names = (argument.name for argument in func._schema.arguments)
            self.of_kernels.append(dict(zip(names, args, strict=False)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("keys", "causal"), [(32, True), (16, False)])
def test_kernels_take_grouped_heads_and_fewer_keys(device, keys, causal):
    with FakeTensorMode(), Arguments() as seen:  # no GPU needed: checks arguments and shapes
        q, k, v = heads(device, torch.bfloat16, keys)
        out, lse, rng = _flash(q, k, v, causal)
        grads = _flash_backward(out, q, out, lse, k, v, list(rng), causal)
    assert [given.get("is_causal", False) for given in seen.of_kernels] == [causal] * 2
    if device == "cuda":
        assert (seen.of_kernels[1]["max_q"], seen.of_kernels[1]["max_k"]) == (32, keys)
    assert out.shape == q.shape
    assert lse.shape == q.shape[:3]
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_ring_is_one_operation_on_each_device(device):
    with FakeTensorMode():
        _, k, v = heads(device, torch.bfloat16, 32)
        q = torch.randn(2, 32, 8, 16, device=device, dtype=torch.bfloat16).transpose(1, 2)
        out, lse, _ = torch.ops.torchtitan.ring_attention(q, k, v, "ring", 0, 2)
    assert (out.shape, out.stride(), out.dtype) == (q.shape, q.stride(), q.dtype)
    assert lse.shape == q.shape[:3]


def test_a_compiled_ring_keeps_no_keys_of_other_ranks():
    graphs: list[list[str]] = []
    kept: list[list[tuple[int, ...]]] = []

    def record(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append([str(n.target) for n in graph.graph.nodes if "torchtitan" in str(n.target)])
        graphs[-1] += ["send" for n in graph.graph.nodes if "c10d" in str(n.target)]
        outputs = graph.graph.output_node().args[0]
        kept.append([tuple(n.meta["val"].shape) for n in outputs if n is not None])
        return graph

    with fake_world(4, rank=0):
        group = dist.group.WORLD.group_name
        q, k, v = (x.requires_grad_() for x in heads("cpu", torch.float32, 32))
        shards = SequenceShards(init_device_mesh("cpu", (4,)), balanced=True)

        @torch.compile(backend=aot_autograd(fw_compiler=record, bw_compiler=record), fullgraph=True)
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return ring_attention(q, k, v, shards, group)

        attend(q, k, v).sum().backward()
    forward, backward = graphs
    assert forward == ["torchtitan.ring_attention.default"]
    assert backward == ["torchtitan.ring_attention_backward.default"]
    # The output, and what the backward pass needs: q, k, v, the output and the denominators.
    assert sorted(kept[0]) == sorted([q.shape, q.shape, k.shape, v.shape, q.shape, q.shape[:3]])
    assert k.grad is not None and k.grad.shape == k.shape


def test_merged_parts_are_attention_to_all_keys():
    q, k, v = heads("cpu", torch.float32, 24)
    (out, lse, _), (block, block_lse, _) = (
        _flash(q, k[:, :, part], v[:, :, part], False) for part in (slice(16), slice(16, 24))
    )
    _merge(out, lse, block, block_lse)
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_a_ring_of_many_ranks_sums_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the error of bfloat16 would grow with their number. A thread is a rank."""
    size, generator = 16, torch.Generator().manual_seed(0)
    inbox: list[Queue[torch.Tensor]] = [Queue() for _ in range(size)]

    def pass_on(tensor: torch.Tensor, group: str, rank: int, size: int) -> torch.Tensor:
        inbox[(rank + 1) % size].put(tensor)
        return inbox[rank].get(timeout=60)

    def attend(rank: int) -> list[torch.Tensor]:
        grad, *qkv = (torch.cat([x[rank], x[2 * size - 1 - rank]], dim=2) for x in chunks)
        out, lse, rng = ring._forward(*qkv, "", rank, size)
        return [out, *ring._backward(grad, *qkv, out, lse, rng, "", rank, size)]

    monkeypatch.setattr(ring, "_pass_on", pass_on)
    grad, q, k, v = (
        torch.randn(1, heads, 16 * size, 16, generator=generator).bfloat16()
        for heads in (4, 4, 2, 2)
    )
    chunks = [x.chunk(2 * size, dim=2) for x in (grad, q, k, v)]
    with ThreadPoolExecutor(size) as pool:
        of_ranks = list(pool.map(attend, range(size)))

    exact = [x.double().requires_grad_() for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True)
    wanted = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    limits = (3e-3, 3.7e-3, 4.5e-3, 4.5e-3)  # with sums in bfloat16: 4.1, 4.2, 6.4 and 6.4e-3
    for parts, want, limit in zip(zip(*of_ranks, strict=True), wanted, limits, strict=True):
        early, late = zip(*(part.chunk(2, dim=2) for part in parts), strict=True)
        got = torch.cat([*early, *reversed(late)], dim=2)
        assert got.dtype == torch.bfloat16
        assert (got - want).norm() < limit * want.norm()
