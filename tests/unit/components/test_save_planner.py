"""What ranks plan to write is each element once; rank 0 plans without an object for each shard."""

from __future__ import annotations

import logging
import pickle
import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import DefaultSavePlanner, SavePlan
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from torchtitan.components.checkpoint.save_planner import LastSave, SharingSavePlanner
from torchtitan.components.checkpoint.save_table import Places, SaveTable, ToldItems

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Where a part begins, and its size."""


def plans_of(
    size: tuple[int, ...], boxes: list[Box], name: str = "w", dtype: torch.dtype = torch.float32
) -> list[SavePlan]:
    """Of as many ranks as there are boxes, of one tensor."""
    properties = TensorProperties(dtype=dtype)
    return [
        SavePlan(
            [
                WriteItem(
                    index=MetadataIndex(name, offsets),
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


def told_by(plans: list[SavePlan]) -> list[SavePlan]:
    """As each rank tells rank 0."""
    items: list[Any] = [ToldItems.of(plan.items, plan.items, {}) for plan in plans]
    return [SavePlan(told) for told in items]


class RankZero:
    """Plans, and writes metadata, as rank 0 does."""

    def __init__(self) -> None:
        self.last = LastSave()

    def create_global_plan(self, plans: list[SavePlan]) -> tuple[list[list[int]], Metadata]:
        """Return the numbers of the items that each rank leaves to others, and the metadata."""
        told = told_by(plans)
        answers, sent = SharingSavePlanner(None, self.last).create_global_plan(told)
        assert sent == Metadata({})
        left: Any = [answer.items for answer in answers]
        assert self.last.table is not None
        places = {rank: places_of(plan, left[rank], rank) for rank, plan in enumerate(plans)}
        contents = self.last.table.metadata(places, StorageMeta(save_id="x"), "1.0")
        return left, pickle.loads(contents)


def places_of(plan: SavePlan, left: list[int], rank: int) -> Places:
    """Where a rank has written what it does not leave to others: in one or two files."""
    items = [item for number, item in enumerate(plan.items) if number not in left]
    results = [
        WriteResult(item.index, 8, _StorageInfo(f"__{rank}_{number % 2}.distcp", number * 300, 300))
        for number, item in enumerate(items)
    ]
    return Places.of(items, results)


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
    "it would be the next row, counted on": ((2, 2), [((0, 0), (1, 2)), ((0, 3), (1, 2))]),
    "it would be the row before": ((2, 2), [((1, -3), (1, 2)), ((1, 0), (1, 2))]),
    "it is elsewhere": ((2, 2), [((0, 0), (1, 2)), ((5, 0), (1, 2))]),
    "an expert lacks": ((4, 2, 3), [((i, 0, 0), (1, 2, 3)) for i in (0, 1, 3)]),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_plan_that_writes_each_element_once_is_taken(name: str) -> None:
    size, boxes = GOOD[name]
    plans = plans_of(size, boxes)
    left, metadata = RankZero().create_global_plan(plans)
    assert len(plans) - sum(map(len, left)) == len(dict(boxes))
    entry: Any = metadata.state_dict_metadata["w"]
    assert entry.size == size and len(entry.chunks) == len(dict(boxes))


@pytest.mark.parametrize("name", BAD)
def test_another_plan_is_refused(name: str) -> None:
    size, boxes = BAD[name]
    with pytest.raises(
        ValueError, match=rf"each element of w \[{', '.join(map(str, size))}\] exactly"
    ):
        RankZero().create_global_plan(plans_of(size, boxes))


def test_what_is_refused_says_where() -> None:
    with pytest.raises(ValueError, match=r"its 23 parts leave a gap, overlap .* at \[2, 2\]$"):
        RankZero().create_global_plan(plans_of(*BAD["a gap in the middle"]))


@pytest.mark.parametrize(
    ("size", "last"), [((6,), (2,)), ((7,), (3,))], ids=["a smaller part", "a larger tensor"]
)
def test_what_is_nearly_laid_out_like_a_tensor_before_is_refused(
    size: tuple[int, ...], last: tuple[int, ...]
) -> None:
    """Tensors that are laid out alike are checked once."""
    plans = plans_of((6,), [((0,), (3,)), ((3,), (3,))], "v")
    for plan, other in zip(plans, plans_of(size, [((0,), (3,)), ((3,), last)]), strict=True):
        plan.items.extend(other.items)
    with pytest.raises(ValueError, match="each element of w"):
        RankZero().create_global_plan(plans)


def is_refused(by: Any, plans: list[SavePlan]) -> bool:
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
        assert is_refused(RankZero(), plans) == expected, (size, boxes)
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


def test_no_python_runs_for_each_shard() -> None:
    """There are millions. Rows cut by FSDP and long columns by tensor parallelism."""

    def steps(rows: int) -> int:
        boxes = [((i, j), (1, 333)) for i in range(rows) for j in (0, 333, 666)]
        items = [plan.items[0] for plan in plans_of((rows, 999), boxes)]
        told, places = ToldItems.of(items, items, {}), places_of(SavePlan(items), [], 0)
        meta = StorageMeta()
        return steps_of(lambda: SaveTable([told]).metadata({0: places}, meta, "1.0"))

    assert steps(960) / steps(48) < 1.1


def test_names_that_ranks_have_in_common_are_read_once() -> None:
    names = (plans_of((1,), [((0,), (1,))], f"w{number}")[0] for number in range(200))
    items = [plan.items[0] for plan in names]

    def steps(ranks: int) -> int:
        told = [ToldItems.of([items[rank]], items, {}) for rank in range(ranks)]
        return steps_of(lambda: SaveTable(told))

    assert steps(100) / steps(2) < 4


def value(name: str) -> WriteItem:
    return WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO)


def test_the_metadata_is_that_of_pytorch() -> None:
    """Of tensors with different dimensions, and values, some of them on several ranks."""
    draw = random.Random(1)
    for _ in range(50):
        plans = [SavePlan([], planner_data={}) for _ in range(5)]
        for number in range(draw.randrange(6)):
            size = tuple(draw.randint(1, 300) for _ in range(draw.randint(0, 3)))
            boxes = random_parts(draw, ((0,) * len(size), size)) if size else [((), ())]
            for rank in draw.sample(range(5), 5):
                for (item,) in (p.items for p in plans_of(size, boxes[rank::5], f"w{number}")):
                    plans[rank].items.append(item)
            for plan in draw.sample(plans, 2):
                plan.items.append(value(f"value {number}"))
        left, metadata = RankZero().create_global_plan(plans)
        kept = [
            SavePlan([item for number, item in enumerate(plan.items) if number not in left[rank]])
            for rank, plan in enumerate(plans)
        ]
        _, expected = create_default_global_save_plan(kept)  # refuses a value of two ranks
        expected.planner_data, expected.version = {}, "1.0"
        expected.storage_meta = StorageMeta(save_id="x")
        expected.storage_data = {
            item.index: _StorageInfo(f"__{rank}_{number % 2}.distcp", number * 300, 300)
            for rank, plan in enumerate(kept)
            for number, item in enumerate(plan.items)
        }
        for of in metadata, expected:
            for entry in of.state_dict_metadata.values():
                if isinstance(entry, TensorStorageMetadata):
                    entry.chunks.sort(key=lambda chunk: chunk.offsets)
        assert metadata == expected
        assert metadata.storage_data.keys() == expected.storage_data.keys()


def test_what_several_ranks_have_is_left_to_the_one_that_writes_least() -> None:
    (large,), (half,), (other,), *small = (
        plan.items
        for name, size in [("a", (2, 4)), ("b", (4,)), ("c", (4,)), *((n, (1,)) for n in "defg")]
        for plan in plans_of(size, [((0,) * len(size), size)], name)
    )
    plans = [SavePlan([large, half, other]), SavePlan([half, other]), SavePlan([other, half])]
    for number, (item,) in enumerate(small):  # more than rank 0 has for itself, but fewer bytes
        plans[1 + number % 2].items.append(item)
    left, _ = RankZero().create_global_plan(plans)
    assert sorted(map(len, left)) == [1, 1, 2] and len(left[0]) == 2


def test_what_a_rank_writes_is_counted_in_bytes() -> None:
    (long,), (square,), (shared,) = (
        plans_of(size, [((0,) * len(size), size)], name, dtype)[0].items
        for name, size, dtype in [
            ("a", (20, 1, 1), torch.bfloat16),
            ("b", (4, 4), torch.float32),
            ("c", (1, 1, 1), torch.int8),
        ]
    )
    plans = [SavePlan([long, shared]), SavePlan([square, shared])]
    assert RankZero().create_global_plan(plans)[0] == [[], [1]]


def test_a_tensor_that_differs_between_ranks_is_that_of_the_first() -> None:
    """As a state that each rank has for itself; it is warned of at the first step."""
    plans = [plans_of((size,), [((0,), (size,))])[0] for size in (5, 3, 5)]
    plans[0].items.append(value("more"))  # so that this rank does not tell the same as the last
    plans.append(SavePlan([value("w")]))
    left, metadata = RankZero().create_global_plan(plans)
    assert left[1] == left[3] == [0] and sorted([left[0], left[2]]) == [[], [0]]
    entry: Any = metadata.state_dict_metadata["w"]
    assert entry.size == (5,) and len(entry.chunks) == 1


def test_a_dtype_that_differs_between_ranks_is_that_of_the_first() -> None:
    """Else the parts would be of another dtype than the metadata says."""
    dtypes = torch.float32, torch.float64
    plans = [plans_of((5,), [((0,), (5,))], dtype=dtype)[0] for dtype in dtypes]
    plans[0].items.append(value("more"))  # so that this rank writes more
    left, metadata = RankZero().create_global_plan(plans)
    assert left == [[], [0]]
    entry: Any = metadata.state_dict_metadata["w"]
    assert entry.properties.dtype == torch.float32


def test_what_differs_is_saved_though_the_first_rank_leaves_it_to_another() -> None:
    """As small tensors, which ranks with the same names divide among them."""
    table = []
    for rank, size in enumerate([5, 3, 4]):
        (item,) = plans_of((size,), [((0,), (size,))])[0].items
        table.append(ToldItems.of([item] if rank else [], [item], {}))
    saved = SaveTable(table)
    assert saved.not_written() == [[], [], [0]]
    places = {0: Places([], np.empty((0, 3), np.int64)), 1: Places(["x"], np.array([[0, 0, 8]]))}
    metadata = pickle.loads(saved.metadata(places, StorageMeta(), "1.0"))
    (entry,) = metadata.state_dict_metadata.values()
    assert entry.size == (3,) and len(entry.chunks) == len(metadata.storage_data) == 1
