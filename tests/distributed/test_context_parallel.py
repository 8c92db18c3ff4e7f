"""Attention over sequences that ranks share equals attention in one process."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from harness import on_ranks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import checkpoint

from torchtitan.config import JobConfig
from torchtitan.distributed.context_parallel import apply_cp, shard_batch
from torchtitan.models.common.attention import CausalMask, ScaledDotProductAttention

RANKS, BATCH, SEQ, HEADS, HEAD_DIM = 4, 2, 64, 12, 16
CPU = torch.device("cpu")

MASKS = {"plain": {}, "documents": {}, "window": {"window": 20}, "chunk": {"chunk": 24}}
MASKS["none"] = {"causal": False}
RUN = ("eager", "checkpoint", "compile")
CASES = [
    *itertools.product((2, 4), ("allgather", "ulysses"), (12, 6), MASKS, ("eager",)),
    *itertools.product((2, 4), ("ring",), (12, 6), ("plain",), ("eager",)),
    *itertools.product((2,), ("allgather", "ulysses", "ring"), (2,), ("plain",), RUN[1:]),
    *itertools.product((4,), ("allgather",), (2,), ("documents",), RUN[1:]),
    (4, "ulysses", 2, "plain", "eager"),
]
"""Ranks that share a sequence, method, key and value heads, mask, how the attention runs."""


class Model(nn.Module):
    """The attention of a model, with nothing around it."""

    def __init__(self, causal: bool = True, **limits: int) -> None:
        super().__init__()
        self.mask = CausalMask(**limits)
        self.layers = nn.ModuleDict({"0": ScaledDotProductAttention(causal=causal)})

    def forward(
        self, batch: dict[str, torch.Tensor], document_mask: bool, run: str
    ) -> torch.Tensor:
        document_ids = batch["document_ids"] if document_mask else None
        mask = self.mask(batch["document_ids"].shape[1], document_ids, CPU)
        attend = self.layers["0"]
        q, k, v = (batch[name].transpose(1, 2) for name in "qkv")
        if run == "checkpoint":
            return checkpoint(attend, q, k, v, mask, use_reentrant=False).transpose(1, 2)
        if run == "compile":
            attend = torch.compile(attend, backend="aot_eager", fullgraph=True)
        return attend(q, k, v, mask).transpose(1, 2)


def whole_batch(kv_heads: int) -> dict[str, torch.Tensor]:
    """Each `[batch, seq, ...]`; `out_grad` is the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    heads = {"q": HEADS, "k": kv_heads, "v": kv_heads, "out_grad": HEADS}
    batch = {
        name: torch.randn(BATCH, SEQ, n, HEAD_DIM, generator=generator) for name, n in heads.items()
    }
    batch["document_ids"] = torch.stack([torch.arange(SEQ) // 23, torch.arange(SEQ) // 40])
    return batch


def attend(model: Model, batch: dict[str, torch.Tensor], document_mask: bool, run: str) -> Any:
    """Output and the gradients of q, k, v, each `[batch, seq, heads, head_dim]`."""
    inputs = [batch[name].requires_grad_() for name in "qkv"]
    out = model(batch, document_mask, run)
    return [out.detach(), *torch.autograd.grad(out, inputs, batch["out_grad"])]


def attend_shared(case: tuple[Any, ...], mesh: DeviceMesh) -> list[torch.Tensor]:
    """The same by the ranks of `mesh`, put together again."""
    _, method, kv_heads, mask, run = case
    config = JobConfig()
    config.training.seq_len, config.parallelism.context_parallel_method = SEQ, method
    model = Model(**MASKS[mask])
    apply_cp(model, mesh, config)
    results = attend(
        model, shard_batch(whole_batch(kv_heads), mesh, config), mask == "documents", run
    )
    places = shard_batch({"places": torch.arange(SEQ).expand(BATCH, -1)}, mesh, config)["places"]
    wholes = []
    for part in results:
        whole = part.new_zeros(BATCH, SEQ, *part.shape[2:])
        whole[:, places[0]] = part
        dist.all_reduce(whole, group=mesh.get_group())
        wholes.append(whole)
    return wholes


def work(folder: Path) -> None:
    meshes = {
        cp: init_device_mesh("cpu", (RANKS // cp, cp), mesh_dim_names=("dp", "cp"))["cp"]
        for cp in (2, 4)
    }
    results = {case: attend_shared(case, meshes[case[0]]) for case in CASES}
    if dist.get_rank() == 0:
        torch.save(results, folder / "results.pt")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Any, ...], list[torch.Tensor]]:
    folder = tmp_path_factory.mktemp("context_parallel")
    on_ranks(RANKS, work, folder)
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_shared_attention_equals_that_of_one_process(case, shared):
    _, _, kv_heads, mask, _ = case
    expected = attend(Model(**MASKS[mask]), whole_batch(kv_heads), mask == "documents", "eager")
    for name, got, want in zip(("output", *"qkv"), shared[case], expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: n + m)
