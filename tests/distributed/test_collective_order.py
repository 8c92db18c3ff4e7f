"""NCCL would finish the communication of every layout, see `collective_order`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from collective_order import Call, problems, recording, train_recorded
from harness import run_ranks
from tiny_llama import OPTIONS
from torch.distributed._functional_collectives import all_reduce

from torchtitan.runtime.process_group import init_distributed

RUN = (
    *OPTIONS,
    *("--training.steps=3", "--metrics.block_norm_freq=2"),
    *("--checkpoint.enable", "--checkpoint.interval=2", "--checkpoint.async_mode=async"),
    *("--validation.enable", "--validation.freq=2", "--validation.steps=1"),
)
EXPERTS = ("--model.name=deepseek_v3", "--model.flavor=debugmodel")
FLOAT8 = (
    "--model.converters=quantize.linear.float8",
    "--quantize.linear.float8.enable_fsdp_float8_all_gather",
)
HSDP = ("--parallelism.data_parallel_replicate_degree=2", "--training.local_batch_size=1")
RING = "--parallelism.context_parallel_method=ring"
INTERLEAVED = "--parallelism.pipeline_parallel_schedule=Interleaved1F1B"
DUAL = "--parallelism.pipeline_parallel_schedule=DualPipeV"


def parallel(**degrees: int) -> tuple[str, ...]:
    return tuple(f"--parallelism.{kind}_parallel_degree={n}" for kind, n in degrees.items())


LAYOUTS = {
    "fsdp2": (2, "--metrics.straggler_freq=3"),
    "ep2xtp2xetp2": (4, *EXPERTS, *parallel(expert=2, tensor=2, expert_tensor=2)),
    "pp2xfsdp2_tied": (4, *parallel(pipeline=2), INTERLEAVED, "--model.flavor=tied"),
}
LONG_LAYOUTS = {
    "hsdp2x2_float8": (4, *HSDP, *FLOAT8, "--activation_checkpoint.mode=full"),
    "fsdp2xtp2_muon": (4, *parallel(tensor=2), "--optimizer.name=Muon"),
    "fsdp2xcp2_ring": (4, *parallel(context=2), RING, "--activation_checkpoint.mode=selective"),
    "hsdp2x2_muon": (4, *HSDP, "--optimizer.name=Muon"),
    "pp2xep2": (4, *parallel(pipeline=2, expert=2), DUAL, *EXPERTS),
    "pp4": (4, *parallel(pipeline=4)),
}


def check(layout: tuple, folder: Path, *options: str) -> None:
    ranks, *own = layout
    run = train_recorded(folder, ranks, *RUN, *own, *options)
    assert min(map(len, run)) > 50
    assert problems(run) == []


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(name: str, tmp_path: Path) -> None:
    check(LAYOUTS[name], tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", LONG_LAYOUTS)
def test_more_layouts(name: str, tmp_path: Path) -> None:
    check(LONG_LAYOUTS[name], tmp_path)
    check(LONG_LAYOUTS[name], tmp_path, "--training.steps=4")  # goes on from its checkpoint


def _recorded(function: Callable[[int], None]) -> list[Call]:
    init_distributed(timeout_seconds=60)
    with recording() as calls:
        function(dist.get_rank())
    dist.destroy_process_group()
    return calls


def _sums(rank: int, *, turn: bool) -> None:
    groups = [dist.new_group(), dist.new_group()]
    sums = [all_reduce(torch.ones(2), "sum", group) for group in groups[:: -1 if turn else 1]]
    assert [float(total.sum()) for total in sums] == [4, 4]


def _sums_in_one_order(rank: int) -> None:
    _sums(rank, turn=False)


def _sums_in_two_orders(rank: int) -> None:
    _sums(rank, turn=rank == 1)


def _swap(rank: int, send_first: bool) -> None:
    own, other = torch.full((2,), rank), torch.empty(2, dtype=torch.int64)
    calls = [lambda: dist.isend(own, 1 - rank), lambda: dist.irecv(other, 1 - rank)]
    for work in [call() for call in calls[:: 1 if send_first else -1]]:
        work.wait()
    assert int(other[0]) == 1 - rank


def _one_sends_first(rank: int) -> None:
    _swap(rank, send_first=rank == 0)


def _both_send_first(rank: int) -> None:
    _swap(rank, send_first=True)


def _batch(rank: int) -> None:
    """The first two ranks swap, in a batch."""
    if rank < 2:
        tensors = torch.ones(2), torch.empty(2)
        pairs = zip((dist.isend, dist.irecv), tensors, strict=True)
        for work in dist.batch_isend_irecv([dist.P2POp(op, t, 1 - rank) for op, t in pairs]):
            work.wait()


def _batch_once_connected(rank: int) -> None:
    dist.all_reduce(torch.ones(1))
    _batch(rank)


@pytest.mark.parametrize(
    "ranks, function", [(2, _sums_in_one_order), (2, _one_sends_first), (3, _batch_once_connected)]
)
def test_what_nccl_would_finish_is_accepted(ranks: int, function: Any) -> None:
    assert problems(run_ranks(_recorded, ranks, function)) == []


@pytest.mark.parametrize(
    "ranks, function", [(2, _sums_in_two_orders), (2, _both_send_first), (3, _batch)]
)
def test_what_only_gloo_finishes_is_found(ranks: int, function: Any) -> None:
    found = problems(run_ranks(_recorded, ranks, function))
    assert len(found) == 2 and "waits for ever" in found[0], found


def test_calls_that_differ_are_found() -> None:
    """Gloo refuses them, too, or it hangs."""
    sums = [Call("0", (0, 1), what) for what in ("allreduce float32 4", "allreduce float32 8")]
    assert len(problems([[call] for call in sums])) == 2
    rows = [
        Call("0", (0, 1), "alltoall", shares=shares)
        for shares in (((1, 2), (1, 3)), ((2, 1), (2, 1)))
    ]
    assert "expects 2 rows, but gets 3" in problems([[call] for call in rows])[0]
