"""Which calls of `torch.distributed` a plan counts as communication."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional

from torchtitan.planning.collectives import Collective, CollectiveRecorder
from torchtitan.runtime.fake_world import fake_world

ROWS = 6
CALLS: dict[str, tuple[str, int, Callable[[torch.Tensor], object]]] = {
    "all_reduce": ("all_reduce", ROWS, dist.all_reduce),
    "several all_reduce": ("all_reduce", 2 * ROWS, lambda x: dist.all_reduce_coalesced([x, x])),
    "functional all_reduce": (
        "all_reduce",
        ROWS,
        lambda x: functional.all_reduce(x, "sum", dist.group.WORLD),
    ),
    "several functional all_reduce": (
        "all_reduce",
        2 * ROWS,
        lambda x: functional.all_reduce_coalesced([x, x], "sum", dist.group.WORLD),
    ),
    "functional broadcast": (
        "broadcast",
        ROWS,
        lambda x: functional.broadcast(x, 0, dist.group.WORLD),
    ),
    "functional broadcast in place": (
        "broadcast",
        ROWS,
        lambda x: torch.ops._c10d_functional.broadcast_(x, 0, dist.group.WORLD.group_name),
    ),
    "functional reduce_scatter into a tensor": (
        "reduce_scatter",
        ROWS,
        lambda x: torch.ops._c10d_functional.reduce_scatter_tensor_out(
            x, "sum", 2, dist.group.WORLD.group_name, out=x[: ROWS // 2].clone()
        ),
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_every_form_of_a_collective_is_counted(call: str) -> None:
    kind, numbers, run = CALLS[call]
    with fake_world(2, rank=0), CollectiveRecorder({"all": dist.group.WORLD}) as recorder:
        run(torch.zeros(ROWS))
    assert recorder.collectives == [Collective(kind, "all", 2, 4 * numbers)]


def test_what_computes_or_waits_is_no_collective() -> None:
    with fake_world(2, rank=0), CollectiveRecorder({"all": dist.group.WORLD}) as recorder:
        dist.barrier()
        torch.zeros(ROWS).sum()
    assert not recorder.collectives


SPLITS = {
    "more to send": ([4, 1], [4, 2], "all_to_all", 2),
    "more to receive": ([3, 3], [5, 1], "all_to_all", 3),
    "nothing for others": ([6, 0], [6, 0], "all_to_all", 0),
    "equal shares": ([3, 3], [3, 3], "all_to_all", 3),
    "a step of a ring": ([0, 6], [0, 6], "send", 6),
}


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("is_functional", [False, True])
def test_an_uneven_all_to_all_sends_the_rows_of_others(name: str, is_functional: bool) -> None:
    received, sent, kind, rows = SPLITS[name]
    x, out = torch.zeros(ROWS, 3), torch.zeros(sum(received), 3)
    with fake_world(2, rank=0), CollectiveRecorder({"all": dist.group.WORLD}) as recorder:
        if is_functional:
            functional.all_to_all_single(x, received, sent, dist.group.WORLD)
        else:
            dist.all_to_all_single(out, x, received, sent)
    (found,) = recorder.collectives
    assert (found.kind, found.sent) == (kind, rows * 3 * 4)


def test_a_group_across_others_is_named_after_them_outermost_first() -> None:
    with fake_world(4, rank=0):
        groups = {"tp": dist.new_group([0, 1]), "fsdp": dist.new_group([0, 2])}
        with CollectiveRecorder(groups) as recorder:
            dist.all_reduce(torch.zeros(ROWS))
    assert [each.group for each in recorder.collectives] == ["fsdp x tp"]


def test_of_equal_groups_what_fsdp_and_ddp_call_has_theirs() -> None:
    """They call `dist` to reduce and to gather; what they do not call, or not so, is of others."""
    world = dist.group
    with fake_world(2, rank=0):
        groups = {"tp": world.WORLD, "fsdp": world.WORLD}
        with CollectiveRecorder(groups) as recorder:
            dist.all_reduce(torch.zeros(ROWS))
            functional.all_reduce(torch.zeros(ROWS), "sum", world.WORLD)
            dist.broadcast(torch.zeros(ROWS), 0)
    found = [(each.kind, each.group) for each in recorder.collectives]
    assert found == [("all_reduce", "fsdp"), ("all_reduce", "tp"), ("broadcast", "tp")]


def test_a_group_across_three_is_named_after_all() -> None:
    with fake_world(8, rank=0):
        groups = {f"g{n}": dist.new_group([0, n]) for n in (1, 2, 4)}
        with CollectiveRecorder(groups) as recorder:
            dist.all_reduce(torch.zeros(ROWS))
    assert [each.group for each in recorder.collectives] == ["g4 x g2 x g1"]
