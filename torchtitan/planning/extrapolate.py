"""Extrapolates traces of deep models from two shallow ones: costs are linear in the layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple, fields
from typing import Any

from .memory import Memory
from .records import PassTrace, StageTrace
from .repetition import Repetition


def extrapolate(few: StageTrace, more: StageTrace, repetition: Repetition) -> StageTrace:
    """Return the trace of a whole stage, whose layers repeat as in `repetition`.

    Args:
        few: trace with the first number of layers in `Repetition.traced`.
        more: trace with the second.
    """
    # Distance of the whole stage from the first trace, in units of that between the two traces.
    steps = repetition.repeats - repetition.traced[0]
    stage = StageTrace()
    for item in fields(StageTrace):
        a, b = getattr(few, item.name), getattr(more, item.name)
        if isinstance(a, PassTrace):
            value: object = _pass(a, b, steps)
        elif isinstance(a, Memory):
            value = _memory(a, b, steps)
        elif isinstance(a, list):
            value = [_memory(x, y, steps) for x, y in _aligned(a, b, repetition)]
        else:
            value = _line(a, b, steps)
        setattr(stage, item.name, value)
    return stage


def _line(few: float, more: float, steps: float) -> float:
    return max(0.0, few + steps * (more - few))


def _aligned(
    few: list[Memory], more: list[Memory], repetition: Repetition
) -> Iterator[tuple[Memory, Memory]]:
    """Yield moments of the two traces with the same distance from the beginning, or else the end.

    Between the ends, memory rises or falls evenly from layer to layer: no moment there is fuller.
    """
    first = len(few) - repetition.depth(repetition.edge)
    for i in range(len(few)):
        yield few[i], more[i if i < first else i - len(few)]


def _memory(few: Memory, more: Memory, steps: float) -> Memory:
    pairs = zip(astuple(few), astuple(more), strict=True)
    parts = [_line(a, b, steps) for a, b in pairs]
    # The two moments may be at different places in the layer, with more of one category and less
    # of another. The total is still right.
    scale = _line(few.total, more.total, steps) / max(sum(parts), 1.0)
    return Memory(*(scale * part for part in parts))


def _pass(few: PassTrace, more: PassTrace, steps: float) -> PassTrace:
    return PassTrace(
        _counts(few.operations, more.operations, steps),
        _counts(few.collectives, more.collectives, steps),
    )


def _counts(few: Counter[Any], more: Counter[Any], steps: float) -> Counter[Any]:
    """Extrapolate counts.

    A key that only the smaller trace has gets a negative count: an optimizer's single call on all
    parameters is longer in the larger trace, and the sum of both is right.
    """
    counts = {key: few[key] + steps * (more[key] - few[key]) for key in few | more}
    return Counter({key: count for key, count in counts.items() if count})
