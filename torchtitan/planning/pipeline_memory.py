"""The memory of a pipeline's rank at each of its actions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from heapq import nlargest

from .memory import Memory
from .records import StageTrace
from .schedule import BACKWARD, FORWARD, INPUT, WEIGHT, Action

_GATHERED = 3
"""Stages of a rank whose parameters PyTorch's schedules keep gathered by FSDP at a time."""


def held_before(
    actions: Sequence[Action], kept: Mapping[int, tuple[float, float]]
) -> Iterator[tuple[Action, float]]:
    """Yield a rank's actions, each with the bytes of activations that are held before it.

    Args:
        kept: stage -> bytes of a micro-batch after its forward pass, and between the two parts of
            a split backward pass.
    """
    held = 0.0
    for action in actions:
        yield action, held
        forward, between = kept[action.stage]
        changes = {
            FORWARD: forward,
            BACKWARD: -forward,
            INPUT: between - forward,
            WEIGHT: -between,
        }
        held += changes[action.kind]


def moments(
    actions: Sequence[Action], stages: Mapping[int, StageTrace], accumulates: bool
) -> Iterator[Memory]:
    """Yield the fullest moments of a rank's actions, without state and buffers.

    Args:
        stages: of the rank, by number.
        accumulates: whether gradients are there from the run before.
    """
    gradients = {n: replace(stage.between, whole_parameters=0) for n, stage in stages.items()}
    sharded = any(own.whole_gradients for own in gradients.values())
    whole = [stage.between.whole_parameters for stage in stages.values()]
    whole = nlargest(_GATHERED, whole) if sharded else whole  # else casts, which all stay
    parameters = Memory(whole_parameters=sum(whole))
    made = set(stages) if accumulates and not sharded else set()
    kept = {n: (stage.activations, stage.kept_for_weights) for n, stage in stages.items()}
    for action, held in held_before(actions, kept):
        stage = stages[action.stage]
        own = {
            FORWARD: [],
            BACKWARD: stage.moments if action.stage in made else stage.moments_first,
            INPUT: stage.moments_inputs,
            WEIGHT: stage.moments_weights,
        }[action.kind]
        if action.kind == WEIGHT:
            made.add(action.stage)
        there = sum((gradients[n] for n in made), parameters) + Memory(activations=held)
        yield from (there + moment for moment in own)
        if action.kind == BACKWARD:
            made.add(action.stage)
    there = sum(gradients.values(), parameters)
    yield from (there + stage.reducing for stage in stages.values())
