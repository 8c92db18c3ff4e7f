"""Searches for the fastest layout that fits: all by arithmetic, the most promising by traces."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torchtitan.config import JobConfig, fail, origin
from torchtitan.errors import ConfigError
from torchtitan.preflight.layout_rules import async_tensor_parallel_problems
from torchtitan.preflight.portable import without_machine
from torchtitan.preflight.problems import refuse
from torchtitan.tools.text import three_digits

from .arithmetic import Arithmetic
from .candidates import Candidate, candidates
from .devices import Device
from .estimate import Traces, plan_run
from .inputs import Inputs
from .plan import Plan
from .trace import try_layout

_NEGLIGIBLE = 1e-4
"""Share of a step's time that no estimate is good enough for."""
_WITHIN_SHARDS = ("tp", "cp", "ep", "etp")
"""Groups of ranks that are the same for any number of replicas."""
_MEMORY_MARGIN = 1.15
_TIME_MARGIN = 1.1
"""Tolerated excess of the arithmetic over the traces: candidates beyond it are not traced. Seen: 1%
above to 14% below in time, 14% above to 22% below in memory (Llama 3 70B on 256)."""


@dataclass
class Found:
    """The result of a search."""

    considered: int = 0
    """Candidates that were estimated by arithmetic."""
    traced: list[tuple[Candidate, Plan]] = field(default_factory=list)
    finished: bool = True
    """Whether every candidate that could win was traced in the given time."""
    hopeless: bool = False
    """Whether none fits by arithmetic, nor the smallest, the only one traced, by its trace."""

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
        """The layouts that no other one beats in both time and memory, fastest first."""
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
    """Trace candidates in the order of their estimated times, until none left can win.

    Args:
        seconds: time limit, which applies after at least one trace.
        tell: called with a description of the current work.

    Raises:
        ConfigError: the job sets no global batch, has replica groups or lacks something for async
            tensor parallelism; or no layout of this many devices is possible.
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
        """Return candidates that need at most `most` bytes by arithmetic, fastest first."""
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
        except ConfigError as error:  # the model refuses it, for example for its number of heads
            refused.append(error)
            return None
        found.traced.append((candidate, plan))
        return plan

    most = _MEMORY_MARGIN * available
    queue = by_time(most)
    if not queue:  # the smallest valid candidate shows how far the arithmetic is too high
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
        if any(_adds_only_replicas(candidate, *pair) for pair in found.traced):
            continue
        if time.monotonic() > end and found.traced:
            found.finished = False
            break
        trace(candidate)
    if refused and not found.traced:
        raise refused[0]
    return found


def _adds_only_replicas(candidate: Candidate, other: Candidate, plan: Plan) -> bool:
    """Whether a candidate is no better than another, which shards over more ranks, and else equal.

    It computes the same, and holds and updates larger shards. So it needs more memory, and all that
    it could save is the time for which the other waits for data-parallel communication.

    Args: plan: of the other.
    """
    if replace(candidate, replicate=other.replicate, shard=other.shard) != other:
        return False
    if candidate.shard >= other.shard or candidate.shard * candidate.cp == 1:  # no FSDP: unlike
        return False
    waiting = max(
        rank.waiting_seconds - sum(t.seconds for t in rank.traffic if t.group in _WITHIN_SHARDS)
        for rank in plan.ranks
    )
    return plan.room < 0 or waiting < _NEGLIGIBLE * plan.step_seconds


def _without_impossible_cp(every: list[Candidate], config: JobConfig) -> list[Candidate]:
    """Remove candidates with context parallelism if the model refuses it.

    Raises:
        ConfigError: the model refuses it, and no layout is without it.
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
    shared = Candidate(1, 1, 1, 2, 1, 1, "none", 1, 1, "")  # over two tensor parallel ranks
    refuse(async_tensor_parallel_problems(shared.config(config)), config)
    if config.training.global_batch_size == -1:
        fail(
            config,
            "training.global_batch_size",
            "a search needs it to compare layouts at the same batch: --global-batch-size N",
        )
    if config.fault_tolerance.enable:
        fail(
            config,
            "fault_tolerance.enable",
            "a search plans a single replica group. Leave [fault_tolerance] out, and give the "
            "devices and the batch of one group",
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
        f"whole number of sequences per data rank. Use a multiple of {world_size}, or of one of "
        f"its divisors if tensor, context or pipeline parallelism takes the rest (now {batch})"
    )
