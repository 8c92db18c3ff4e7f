"""Traces of deep models from two traces of shallow ones: costs are linear in the layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple, fields
from typing import Any

from .memory import Memory
from .records import PassTrace, StageTrace, StepTrace
from .repetition import Repetition


def extrapolate(few: StepTrace, more: StepTrace, repetition: Repetition) -> StepTrace:
    """The trace of a whole stage, whose layers repeat as `repetition` says.

    Args:
        few: with the first number of `Repetition.traced` of the stage's layers.
        more: with the second.
    """
    # How far the whole stage is from the first trace, where the second is at 1.
    steps = repetition.repeats - repetition.traced[0]
    pairs = zip(few.stages, more.stages, strict=True)
    return StepTrace(
        parameters=_line(few.parameters, more.parameters, steps),
        stages=[_stage(a, b, repetition, steps) for a, b in pairs],
        optimizer=_pass(few.optimizer, more.optimizer, steps),
        optimizer_temporary=_line(few.optimizer_temporary, more.optimizer_temporary, steps),
    )


def _line(few: float, more: float, steps: float) -> float:
    return max(0.0, few + steps * (more - few))


def _stage(few: StageTrace, more: StageTrace, repetition: Repetition, steps: float) -> StageTrace:
    stage = StageTrace()
    for item in fields(StageTrace):
        a, b = getattr(few, item.name), getattr(more, item.name)
        if isinstance(a, PassTrace):
            value: object = _pass(a, b, steps)
        elif isinstance(a, list):
            value = [_memory(x, y, steps) for x, y in _aligned(a, b, repetition)]
        else:
            value = _line(a, b, steps)
        setattr(stage, item.name, value)
    return stage


def _aligned(
    few: list[Memory], more: list[Memory], repetition: Repetition
) -> Iterator[tuple[Memory, Memory]]:
    """Moments of the two traces that are as far from the beginning, or else from the end.

    Between the ends memory goes up or down evenly from layer to layer, so no moment is fuller.
    """
    first = len(few) - repetition.depth(repetition.edge)
    for i in range(len(few)):
        yield few[i], more[i if i < first else i - len(few)]


def _memory(few: Memory, more: Memory, steps: float) -> Memory:
    pairs = zip(astuple(few), astuple(more), strict=True)
    parts = [_line(a, b, steps) for a, b in pairs]
    # The two may be at different places in the layer, with more of one category and less of
    # another. The total is right all the same.
    scale = _line(few.total, more.total, steps) / max(sum(parts), 1.0)
    return Memory(*(scale * part for part in parts))


def _pass(few: PassTrace, more: PassTrace, steps: float) -> PassTrace:
    return PassTrace(
        _counts(few.operations, more.operations, steps),
        _counts(few.collectives, more.collectives, steps),
    )


def _counts(few: Counter[Any], more: Counter[Any], steps: float) -> Counter[Any]:
    """Negative for what only the smaller trace has: an optimizer's one call on all parameters is
    longer in the other, and the sum of both is right."""
    counts = {key: few[key] + steps * (more[key] - few[key]) for key in few | more}
    return Counter({key: count for key, count in counts.items() if count})
