"""Selective checkpointing keeps what a ring returns, and not its blocks; no ring is repeated."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from harness import on_ranks
from test_context_parallel import BATCH, HEAD_DIM, HEADS, SEQ, Model, whole_batch
from torch.distributed.device_mesh import init_device_mesh

from torchtitan.config import JobConfig
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.distributed.context_parallel import apply_cp, shard_batch
from torchtitan.planning.collectives import CollectiveRecorder
from torchtitan.planning.memory import PeakMemory
from torchtitan.planning.operations import OperationRecorder

RANKS = 4
FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"


def least(measure: Callable[[], int]) -> int:
    """What is kept: gloo's threads hold a block for a moment after it has been sent."""
    values = []
    for _ in range(20):
        values.append(measure())
        time.sleep(0.01)
    return min(values)


def attend(mode: str) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("cp",))
    config = JobConfig()
    config.training.seq_len, config.parallelism.context_parallel_method = SEQ, "ring"
    config.activation_checkpoint.mode = mode
    model = Model()
    apply_cp(model, mesh, config)
    apply_ac(model, config)
    batch = shard_batch(whole_batch(kv_heads=2), mesh, config)
    inputs = [batch[name].requires_grad_() for name in "qkv"]
    memory = PeakMemory()
    memory.add(*inputs)
    before = memory.current
    with memory, OperationRecorder() as forward:
        out = model(batch, False, "eager")
        kept = least(lambda: memory.current - before)
    with CollectiveRecorder({"cp": mesh.get_group()}) as sent, OperationRecorder() as backward:
        gradients = torch.autograd.grad(out, inputs, batch["out_grad"])
    return {
        "kept": kept,
        "kernels": [
            sum(n for operation, n in seen.operations.items() if operation.name == FLASH)
            for seen in (forward, backward)
        ],
        "sent": len(sent.collectives),
        "results": [out.detach(), *gradients],
    }


def work(folder: Path) -> None:
    found = {mode: attend(mode) for mode in ("none", "full", "selective")}
    torch.save(found, folder / f"{dist.get_rank()}.pt")


def test_selective_checkpointing_keeps_a_ring_whole(tmp_path: Path) -> None:
    on_ranks(RANKS, work, tmp_path)
    queries = BATCH * HEADS * SEQ // RANKS
    for rank in range(RANKS):
        found = torch.load(tmp_path / f"{rank}.pt")
        none, full, selective = (found[mode] for mode in ("none", "full", "selective"))
        assert selective["kept"] == queries * (HEAD_DIM + 1) * 4  # output and denominators
        assert none["kernels"] == selective["kernels"] == [RANKS, 0]
        assert full["kernels"] == [RANKS, RANKS]
        assert none["sent"] == selective["sent"] == full["sent"] - (RANKS - 1)
        torch.testing.assert_close(selective["results"], none["results"], rtol=0, atol=0)
