"""Looks for the fastest layout that fits: all by arithmetic, the most promising by traces."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torchtitan.config import JobConfig, fail, origin
from torchtitan.config.portable import without_machine
from torchtitan.errors import ConfigError
from torchtitan.tools.text import three_digits

from .arithmetic import Arithmetic
from .candidates import Candidate, candidates
from .devices import Device
from .estimate import Plan, Traces, plan_run
from .inputs import Inputs
from .trace import try_layout

_MEMORY_MARGIN = 1.15
_TIME_MARGIN = 1.1
"""How far above the traces the arithmetic may be: candidates beyond are not traced. Seen: it is 1%
above them to 14% below in time, 14% above to 22% below in memory (Llama 3 70B on 256)."""


@dataclass
class Found:
    """What a search came to."""

    considered: int = 0
    """Candidates that arithmetic looked at."""
    traced: list[tuple[Candidate, Plan]] = field(default_factory=list)
    finished: bool = True
    """Whether every candidate that could win was traced in the time there was."""
    hopeless: bool = False
    """Whether none fits by arithmetic, and by a trace not the smallest, the only one traced."""

    @property
    def fitting(self) -> list[tuple[Candidate, Plan]]:
        """Fastest first."""
        fit = [(c, plan) for c, plan in self.traced if plan.room >= 0]
        return sorted(fit, key=lambda pair: pair[1].step_seconds)

    @property
    def best(self) -> Plan | None:
        return self.fitting[0][1] if self.fitting else None

    @property
    def pareto(self) -> list[tuple[Candidate, Plan]]:
        """The layouts that no other beats in both time and memory, fastest first."""
        front: list[tuple[Candidate, Plan]] = []
        for candidate, plan in self.fitting:
            if not front or plan.peak < front[-1][1].peak:
                front.append((candidate, plan))
        return front


def search(
    config: JobConfig,
    world_size: int,
    device: Device,
    host_size: int = 8,
    seconds: float = 300.0,
    tell: Callable[[str], None] = lambda text: None,
) -> Found:
    """Trace candidates in the order of their times by arithmetic, until none left can win.

    Args:
        seconds: stop then at the latest, after at least one trace.
        tell: called with what is being done.

    Raises:
        ConfigError: the job names no global batch or has replica groups, or no layout of so many
            devices can be.
    """
    _check(config)
    end = time.monotonic() + seconds
    tell("tracing one layer under each checkpointing mode")
    every = list(candidates(config, world_size, host_size))
    if not every:
        raise ConfigError(_no_layout(config, world_size))
    every = _without_impossible_cp(every, config)
    inputs = Inputs.of(config)
    arithmetic = Arithmetic(config, device, host_size, inputs)
    available = device.memory - device.host_memory_reserved

    def by_time(most: float) -> list[Candidate]:
        """The fastest first, of those that take at most `most` bytes by arithmetic."""
        possible = [c for c in every if arithmetic.memory(c) <= most]
        return sorted(possible, key=lambda c: (arithmetic.seconds(c), c.cp, c.tp))

    found = Found(considered=len(every))
    known: Traces = {}
    refused: list[ConfigError] = []

    def trace(candidate: Candidate) -> Plan | None:
        tell(_state(found, candidate))
        try:
            job = candidate.config(config)
            plan = plan_run(job, world_size, device, host_size, known, inputs)
        except ConfigError as error:  # a rule of this model, such as the number of heads
            refused.append(error)
            return None
        found.traced.append((candidate, plan))
        return plan

    most = _MEMORY_MARGIN * available
    queue = by_time(most)
    if not queue:  # the smallest that can be shows by how much the arithmetic is too high
        for candidate in sorted(every, key=arithmetic.memory):
            if plan := trace(candidate):
                found.hopeless = plan.room < 0
                if not found.hopeless:
                    queue = by_time(most * arithmetic.memory(candidate) / plan.peak)
                    queue.remove(candidate)
                break
    for candidate in queue:
        best = found.best
        if best and arithmetic.seconds(candidate) > _TIME_MARGIN * best.step_seconds:
            break
        if time.monotonic() > end and found.traced:
            found.finished = False
            break
        trace(candidate)
    if refused and not found.traced:
        raise refused[0]
    return found


def _without_impossible_cp(every: list[Candidate], config: JobConfig) -> list[Candidate]:
    """Leave out context parallelism if the model refuses it.

    Raises:
        ConfigError: it does, and no layout is without.
    """
    whole = [candidate for candidate in every if candidate.cp == 1]
    if len(whole) == len(every):
        return every
    shared = replace(every[0], replicate=1, shard=1, cp=2, tp=1, pp=1, ep=1, schedule="")
    try:
        try_layout(without_machine(shared.config(config), 2), 2)
    except ConfigError:
        if not whole:
            raise
        return whole
    return every


def _check(config: JobConfig) -> None:
    if config.training.global_batch_size == -1:
        fail(
            config,
            "training.global_batch_size",
            "a search needs it, as layouts are compared at the same batch: --global-batch-size N",
        )
    if config.fault_tolerance.enable:
        fail(
            config,
            "fault_tolerance.enable",
            "a search is for one replica group. Set it to false, and give the devices and the "
            "share of the batch that a group has",
        )


def _state(found: Found, candidate: Candidate) -> str:
    best = ""
    if found.fitting:
        layout, plan = found.fitting[0]
        best = f" (best: {layout}, {three_digits(plan.step_seconds)} s a step)"
    return (
        f"{found.considered:,} layouts considered, {len(found.traced)} traced{best}, next: "
        f"{candidate}, checkpointing {candidate.ac}"
    )


def _no_layout(config: JobConfig, world_size: int) -> str:
    batch = config.training.global_batch_size
    return (
        f"{origin(config, 'training.global_batch_size')}: no layout of {world_size} devices has a "
        f"whole number of sequences a data rank. Use a multiple of {world_size}, or of a divisor "
        f"of it that leaves the rest to tensor, context or pipeline parallelism (now {batch})"
    )
