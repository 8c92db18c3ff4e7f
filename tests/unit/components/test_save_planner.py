"""What ranks plan to write is each element once; found in time linear in the number of parts."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import DefaultSavePlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from torchtitan.components.checkpoint.save_planner import LastSave, SharingSavePlanner

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Where a part begins, and its size."""


def plans_of(size: tuple[int, ...], boxes: list[Box]) -> list[SavePlan]:
    """Of as many ranks as there are boxes, of a tensor `w`."""
    properties = TensorProperties(dtype=torch.float32)
    return [
        SavePlan(
            [
                WriteItem(
                    index=MetadataIndex("w", offsets),
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        chunk=ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)),
                        properties=properties,
                        size=torch.Size(size),
                    ),
                )
            ],
            planner_data={},
        )
        for offsets, sizes in boxes
    ]


def planner() -> SharingSavePlanner:
    return SharingSavePlanner(None, LastSave())


def grid(rows: int, columns: int) -> list[Box]:
    return [((i, 2 * j), (1, 2)) for i in range(rows) for j in range(columns)]


GOOD: dict[str, tuple[tuple[int, ...], list[Box]]] = {
    "one": ((4,), [((0,), (4,))]),
    "a scalar": ((), [((), ())]),
    "uneven, with an empty part": ((5,), [((0,), (3,)), ((3,), (2,)), ((5,), (0,))]),
    "nothing in it": ((0, 3), [((0, 0), (0, 3))]),
    "a grid": ((6, 8), grid(6, 4)),
    "replicas": ((6, 8), grid(6, 4) * 3),
    "no grid": ((4, 4), [((0, 0), (1, 3)), ((0, 3), (3, 1)), ((3, 1), (1, 3)), ((1, 0), (3, 1))]
        + [((1, 1), (2, 2))]),
    "experts": ((4, 2, 3), [((i, j, 0), (2, 1, 3)) for i in (0, 2) for j in (0, 1)]),
}  # fmt: skip
BAD: dict[str, tuple[tuple[int, ...], list[Box]]] = {
    "a gap": ((6,), [((0,), (2,)), ((3,), (3,))]),
    "a gap at the end": ((6, 8), grid(6, 4)[:-1]),
    "a gap in the middle": ((6, 8), grid(6, 4)[:9] + grid(6, 4)[10:]),
    "an overlap": ((6,), [((0,), (4,)), ((3,), (3,))]),
    "an overlap as large as a gap": ((10,), [((0,), (6,)), ((4,), (4,))]),
    "two at one place": ((4, 4), [((0, 0), (4, 4)), ((0, 1), (4, 3))]),
    "one around another": ((4, 4), [((0, 0), (4, 4)), ((1, 1), (2, 2))]),
    "it sticks out": ((6,), [((0,), (3,)), ((3,), (4,))]),
    "it sticks out before": ((6,), [((-1,), (4,)), ((3,), (3,))]),
    "it sticks out to the side": ((2, 2), [((0, 0), (1, 3)), ((1, 0), (1, 1))]),
    "it is elsewhere": ((2, 2), [((0, 0), (1, 2)), ((5, 0), (1, 2))]),
    "an expert lacks": ((4, 2, 3), [((i, 0, 0), (1, 2, 3)) for i in (0, 1, 3)]),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_plan_that_writes_each_element_once_is_taken(name: str) -> None:
    size, boxes = GOOD[name]
    plans, metadata = planner().create_global_plan(plans_of(size, boxes))
    assert sum(len(plan.items) for plan in plans) == len(dict(boxes))
    entry: Any = metadata.state_dict_metadata["w"]
    assert entry.size == size and len(entry.chunks) == len(dict(boxes))


@pytest.mark.parametrize("name", BAD)
def test_another_plan_is_refused(name: str) -> None:
    size, boxes = BAD[name]
    with pytest.raises(
        ValueError, match=rf"each element of w \[{', '.join(map(str, size))}\] exactly"
    ):
        planner().create_global_plan(plans_of(size, boxes))


def test_what_is_refused_says_where() -> None:
    with pytest.raises(ValueError, match=r"its 23 parts leave a gap, overlap .* at \[2, 2\]$"):
        planner().create_global_plan(plans_of(*BAD["a gap in the middle"]))


def is_refused(by: SavePlanner, plans: list[SavePlan]) -> bool:
    try:
        by.create_global_plan(plans)
    except ValueError:
        return True
    return False


def random_parts(draw: random.Random, box: Box) -> list[Box]:
    """A box that is cut, along any dimension and anywhere, again and again."""
    offsets, sizes = box
    dim = draw.randrange(len(sizes))
    if sizes[dim] < 2 or draw.random() < 0.25:
        return [box]
    at = draw.randrange(1, sizes[dim])
    second = (*offsets[:dim], offsets[dim] + at, *offsets[dim + 1 :])
    return [
        *random_parts(draw, (offsets, (*sizes[:dim], at, *sizes[dim + 1 :]))),
        *random_parts(draw, (second, (*sizes[:dim], sizes[dim] - at, *sizes[dim + 1 :]))),
    ]


def test_what_pytorch_refuses_and_no_more(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)  # PyTorch has a warning for each
    draw = random.Random(0)
    refused = 0
    for _ in range(400):
        size = tuple(draw.randint(1, 5) for _ in range(draw.randint(1, 3)))
        boxes = random_parts(draw, ((0,) * len(size), size))
        if draw.random() < 0.5:  # move an edge, or two: then the volume may be right
            for _ in range(draw.randint(1, 2)):
                number, dim = draw.randrange(len(boxes)), draw.randrange(len(size))
                offsets, sizes = map(list, boxes[number])
                by = draw.choice((-1, 1))
                offsets[dim] += by * draw.randint(0, 1)
                sizes[dim] = max(0, sizes[dim] + by * draw.randint(0, 1))
                boxes[number] = tuple(offsets), tuple(sizes)
        # With one plan PyTorch takes what has gaps.
        plans = [*plans_of(size, boxes), SavePlan([], planner_data={})]
        expected = is_refused(DefaultSavePlanner(), plans)
        assert is_refused(planner(), plans) == expected, (size, boxes)
        refused += expected
    assert 100 < refused < 200


def steps_of(call: Callable[[], Any]) -> int:
    """Instructions of Python's interpreter, which no load of the machine changes."""
    steps = 0

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal steps
        frame.f_trace_opcodes = True
        steps += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return steps


def test_twice_the_parts_take_twice_the_steps() -> None:
    """Rows cut by FSDP and long columns by tensor parallelism, where PyTorch compares all rows."""

    def steps(rows: int) -> int:
        boxes = [((i, j), (1, 333)) for i in range(rows) for j in (0, 333, 666)]
        plans = plans_of((rows, 999), boxes)
        return steps_of(lambda: planner().create_global_plan(plans))

    assert steps(96) / steps(48) < 2.1
