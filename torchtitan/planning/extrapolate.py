"""Extrapolates traces of deep models from shallow ones: costs are linear in the layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import astuple, fields
from typing import Any

from .memory import Memory
from .records import PassTrace, StageTrace
from .repetition import Repetition

Weights = list[int]
"""Of the traces in a sum of them."""


def extrapolate(traces: list[StageTrace], found: list[Repetition]) -> StageTrace:
    """Return the trace of a whole stage, whose layers repeat as in `found`.

    Args:
        traces: that with the fewest layers, and for each of `found`, that in which it is longer.
    """
    left_out = [each.left_out for each in found]
    weights = [1 - sum(left_out), *left_out]
    middles = list(_middles(found))
    whole = StageTrace()
    for item in fields(StageTrace):
        values = [getattr(stage, item.name) for stage in traces]
        if isinstance(values[0], PassTrace):
            value: object = _pass(values, weights)
        elif isinstance(values[0], Memory):
            value = _memory(values, weights)
        elif isinstance(values[0], dict):
            value = values[0]
        elif isinstance(values[0], list):
            few, *more = values
            more = [_aligned(len(few), *pair) for pair in zip(more, middles, strict=True)]
            value = [_memory(moments, weights) for moments in zip(few, *more, strict=True)]
        else:
            value = _number(values, weights)
        setattr(whole, item.name, value)
    return whole


def _middles(found: list[Repetition]) -> Iterator[int]:
    """Yield the number of layers before the middle of each repetition, in the smallest trace."""
    left_out = 0
    for each in found:
        yield each.first - left_out + each.edge * each.period
        left_out += each.left_out * each.period


def _aligned(few: int, more: list[Memory], middle: int) -> list[Memory]:
    """Return a moment for each of `few`, with the same distance from the beginning, or the end.

    The last ones are those of the backward pass in the layers before the middle of a repetition.
    Between its ends, memory rises or falls evenly from layer to layer: no moment there is fuller.
    """
    return more[: few - middle] + more[len(more) - middle :]


def _number(values: Sequence[float], weights: Weights) -> float:
    return max(0.0, sum(w * value for w, value in zip(weights, values, strict=True)))


def _memory(moments: Sequence[Memory], weights: Weights) -> Memory:
    parts = [_number(values, weights) for values in zip(*map(astuple, moments), strict=True)]
    # The moments may be at different places in the layer, with more of one category and less of
    # another. The total is still right.
    scale = _number([moment.total for moment in moments], weights) / max(sum(parts), 1.0)
    return Memory(*(scale * part for part in parts))


def _pass(passes: Sequence[PassTrace], weights: Weights) -> PassTrace:
    return PassTrace(
        _counts([each.operations for each in passes], weights),
        _counts([each.collectives for each in passes], weights),
    )


def _counts(counts: Sequence[Counter[Any]], weights: Weights) -> Counter[Any]:
    """Extrapolate counts.

    A key that only the smallest trace has gets a negative count: an optimizer's single call on all
    parameters is longer in the larger traces, and the sum is right.
    """
    whole: Counter[Any] = Counter()
    for count, weight in zip(counts, weights, strict=True):
        for key in count:
            whole[key] += weight * count[key]
    return Counter({key: count for key, count in whole.items() if count})
