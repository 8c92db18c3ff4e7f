"""Simulates PyTorch's pipeline schedules: when each stage works, waits and holds activations.

The order of actions comes from the schedule class that training will use; only the durations are
estimates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from torchtitan.runtime.fake_world import fake_world

FORWARD, BACKWARD, INPUT, WEIGHT, REDUCE = "F", "B", "I", "W", "R"
_GATHER = "UNSHARD"


@dataclass(frozen=True)
class Action:
    """One action of a rank for one micro-batch."""

    stage: int
    kind: str
    """`F`orward; `B`ackward, or its two parts for the `I`nput and the `W`eights; `R`eduction of
    the gradients among data ranks, after the last micro-batch."""
    micro_batch: int
    gathers: bool = field(default=False, compare=False)
    """Whether the stage's parameters must be gathered for it (FSDP)."""


@dataclass(frozen=True)
class StageCost:
    """Seconds of one micro-batch."""

    forward: float
    backward: float
    inputs: float = 0.0
    """The part of a split backward pass that gives the gradients of inputs."""
    weights: float = 0.0
    """The part that gives those of weights."""
    send: float = 0.0
    """Until the next stage has the output, or the previous stage the gradient."""
    start: float = 0.0
    """Extra seconds of a pass that waits for parameters."""
    finish: float = 0.0
    """The reduction of the gradients."""

    def seconds(self, action: Action) -> float:
        seconds = {
            FORWARD: self.forward,
            BACKWARD: self.backward,
            INPUT: self.inputs,
            WEIGHT: self.weights,
            REDUCE: self.finish,
        }
        return seconds[action.kind] + (self.start if action.gathers else 0.0)


@dataclass
class Timeline:
    """The result of simulating a schedule."""

    seconds: float
    """From the first action to the last."""
    spans: dict[int, list[tuple[Action, float, float]]] = field(default_factory=dict)
    """Rank -> its actions, with start and end in seconds."""

    @property
    def bubble(self) -> float:
        """Share of the time in which a rank waits, on average."""
        busy = sum(end - start for spans in self.spans.values() for _, start, end in spans)
        return 1 - busy / (self.seconds * len(self.spans)) if self.seconds else 0.0


def actions_of(
    schedule: str, stages_of_rank: Sequence[Sequence[int]], micro_batches: int, split: bool = True
) -> dict[int, list[Action]]:
    """Return rank -> its actions in order.

    Args:
        schedule: `parallelism.pipeline_parallel_schedule`.
        stages_of_rank: numbers of the stages of each rank.
        split: whether backward passes are split, if the schedule does so: see `splits_backward`.
    """
    schedule_class = get_schedule_class(schedule)
    if issubclass(schedule_class, PipelineScheduleSingle):
        return {
            rank: _one_stage(schedule, rank, len(stages_of_rank), micro_batches)
            for rank in range(len(stages_of_rank))
        }
    number = sum(map(len, stages_of_rank))
    # Every rank of a schedule knows all ranks' actions.
    with fake_world(len(stages_of_rank), rank=0):
        stages = [
            PipelineStage(nn.Identity(), stage, number, torch.device("cpu"), group=dist.group.WORLD)
            for stage in stages_of_rank[0]
        ]
        built = schedule_class(
            stages, n_microbatches=micro_batches, loss_fn=lambda *_: None, scale_grads=False
        )
    orders = built.pipeline_order_with_comms
    return {rank: list(_flatten(order, split)) for rank, order in orders.items()}


def _one_stage(schedule: str, stage: int, stages: int, micro_batches: int) -> list[Action]:
    """Return the order of GPipe or 1F1B, which PyTorch has only as code (printed ones are off)."""
    ahead = micro_batches if schedule == "GPipe" else min(micro_batches, stages - stage)
    actions = [Action(stage, FORWARD, number, number == 0) for number in range(ahead)]
    for number in range(micro_batches):
        actions.append(Action(stage, BACKWARD, number))
        if ahead + number < micro_batches:
            actions.append(Action(stage, FORWARD, ahead + number))
    return actions


def _flatten(actions: Sequence[Any], split: bool) -> Iterator[Action]:
    """Drop communication but for gathers, and serialize actions that run together."""
    gathered: set[int] = set()  # stages, since their last action
    for action in actions:
        for part in action.sub_actions or [action]:
            stage, kind = part.stage_index, part.computation_type.value
            if kind == _GATHER:
                gathered.add(stage)
            if kind in (INPUT, WEIGHT) and not split:
                kind = BACKWARD if kind == INPUT else ""
            if kind in (FORWARD, BACKWARD, INPUT, WEIGHT):
                yield Action(stage, kind, part.microbatch_index, stage in gathered)
                gathered.discard(stage)


def play(actions: Mapping[int, Sequence[Action]], costs: Sequence[StageCost]) -> Timeline:
    """Simulate each rank's actions in order, each as soon as its inputs have arrived.

    Args:
        actions: rank -> its actions, from `actions_of`.
        costs: of each stage, in order.

    Raises:
        ValueError: the actions wait for one another in a circle.
    """
    rank_of = {action.stage: rank for rank, todo in actions.items() for action in todo}
    ends: dict[Action, float] = {}
    clock = dict.fromkeys(actions, 0.0)
    done = dict.fromkeys(actions, 0)
    timeline = Timeline(0.0, {rank: [] for rank in actions})
    left = sum(map(len, actions.values()))
    while left:
        before = left
        for rank, todo in actions.items():
            while done[rank] < len(todo):
                action = todo[done[rank]]
                ready = _ready(action, ends, costs, rank_of)
                if ready is None:
                    break
                start = max(clock[rank], ready)
                end = start + costs[action.stage].seconds(action)
                timeline.spans[rank].append((action, start, end))
                ends[action] = clock[rank] = end
                done[rank] += 1
                left -= 1
        if left == before:
            raise ValueError("the actions of the pipeline schedule wait for one another")
    for rank, todo in actions.items():
        for stage in sorted({action.stage for action in todo}):
            if costs[stage].finish:
                start, clock[rank] = clock[rank], clock[rank] + costs[stage].finish
                timeline.spans[rank].append((Action(stage, REDUCE, -1), start, clock[rank]))
    timeline.seconds = max(clock.values(), default=0.0)
    return timeline


def _ready(
    action: Action,
    ends: Mapping[Action, float],
    costs: Sequence[StageCost],
    rank_of: Mapping[int, int],
) -> float | None:
    """Return when the inputs of an action have arrived; None if that is not known yet."""
    stage, micro_batch = action.stage, action.micro_batch
    if action.kind == WEIGHT:
        return ends.get(Action(stage, INPUT, micro_batch))
    if action.kind == FORWARD:
        neighbour, sources = stage - 1, [Action(stage - 1, FORWARD, micro_batch)]
    elif stage == len(costs) - 1:
        return ends.get(Action(stage, FORWARD, micro_batch))
    else:
        neighbour = stage + 1
        sources = [Action(neighbour, kind, micro_batch) for kind in (BACKWARD, INPUT)]
    if neighbour < 0:
        return 0.0
    end = next((ends[source] for source in sources if source in ends), None)
    if end is None:
        return None
    sender = min(stage, neighbour)
    return end + (0.0 if rank_of[neighbour] == rank_of[stage] else costs[sender].send)
