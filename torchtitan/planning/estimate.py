"""From traces to a plan: memory and time of each pipeline rank, and of the whole step.

Memory is counted. Time is a roofline: a matrix product takes its FLOPs over the device's rate, any
other operation its bytes over the memory's, a collective its bytes over the link's, whichever of
computing and overlapped communication is longer; the pipeline's schedule is played.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch.distributed as dist
import torch.nn as nn

from torchtitan.config import JobConfig
from torchtitan.config.validate import resolve_batch
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.pipeline_split import stages_of_rank
from torchtitan.protocols.train_spec import get_train_spec

from .collectives import Collective
from .devices import Device
from .extrapolate import extrapolate
from .layers import PERIODS, Repetition, layer_signatures
from .memory import Memory
from .records import PassTrace, StageTrace, StepTrace
from .schedule import StageCost, Timeline, actions_of, play
from .trace import fake_world, meta_parts, repetition_of, trace_step

OVERLAPPED = ("fsdp", "expert_dp", "dp_replicate")
"""Groups whose collectives run while the device computes; others are waited for."""
FUSED = 0.4
"""Share of the bytes of element-wise operations that is left when they are compiled together."""


@dataclass(frozen=True)
class Traffic:
    """What a rank sends to a group in a step."""

    group: str
    kind: str
    ranks: int
    link: str
    """`host` if the group is within one, else `network`."""
    calls: float
    sent: float
    """Bytes."""
    seconds: float


@dataclass
class RankPlan:
    """What a rank of one place in the pipeline needs."""

    pp_rank: int
    stages: list[int]
    memory: Memory
    """At the peak."""
    compute_seconds: float
    """Matrix products in a step."""
    other_seconds: float
    """Other operations, bound by the memory's bandwidth, and the optimizer."""
    waiting_seconds: float
    """For collectives that do not overlap, or not wholly."""
    traffic: list[Traffic] = field(default_factory=list)

    @property
    def peak(self) -> float:
        return self.memory.total


@dataclass
class Plan:
    """A whole run, as it is expected to be."""

    config: JobConfig
    device: Device
    world_size: int
    ranks: list[RankPlan]
    step_seconds: float
    tokens_per_step: int
    flops_per_token: int
    nparams: int
    accumulation_steps: int
    timeline: Timeline | None = None

    @property
    def tokens_per_second(self) -> float:
        """Of one device."""
        return self.tokens_per_step / self.step_seconds / self.world_size

    @property
    def mfu(self) -> float:
        return self.tokens_per_second * self.flops_per_token / self.device.flops

    @property
    def bubble(self) -> float:
        return self.timeline.bubble if self.timeline else 0.0

    @property
    def peak(self) -> float:
        """Bytes of the rank that needs most."""
        return max(rank.peak for rank in self.ranks)

    @property
    def room(self) -> float:
        """Bytes that are left on that rank; negative if it does not fit."""
        return self.device.memory - self.device.host_memory_reserved - self.peak

    @property
    def bound(self) -> str:
        """What takes most of the time."""
        rank = max(self.ranks, key=lambda r: r.compute_seconds + r.other_seconds)
        shares = {
            "matrix products": rank.compute_seconds,
            "memory bandwidth": rank.other_seconds,
            "communication": rank.waiting_seconds,
            "pipeline bubble": self.bubble * self.step_seconds,
        }
        return max(shares, key=shares.get)


def plan_run(config: JobConfig, world_size: int, device: Device, host_size: int = 8) -> Plan:
    """Trace the distinct ranks of a run, and estimate it.

    Args:
        host_size: devices of a host.

    Raises:
        ConfigError: the job is not valid for the world.
    """
    config, compiled = _traceable(config)
    spec = get_train_spec(config.model.name, config.model.flavor)
    model_args = spec.model_args.update_from_config(config)
    dims = ParallelDims.from_config(config.parallelism, world_size)
    pp = dims.pp
    estimator = _Estimator(device, host_size, compiled)
    traces = _trace_pipeline(config, world_size, dims)
    global_batch, accumulation = resolve_batch(config, dims.dp)

    parallelism = config.parallelism
    micro_batches = 1
    if pp > 1:
        micro_batches = (
            config.training.local_batch_size // parallelism.pipeline_parallel_microbatch_size
        )
    stages = [stages_of_rank(config, rank) for rank in range(pp)] if pp > 1 else [[0]]
    costs: dict[int, StageCost] = {}
    for rank, (trace, groups) in enumerate(traces):
        for number, stage in zip(stages[rank], trace.stages, strict=True):
            costs[number] = estimator.cost(stage, groups)
    ordered = [costs[number] for number in sorted(costs)]
    timeline = None
    if pp > 1:
        schedule = parallelism.pipeline_parallel_schedule
        timeline = play(actions_of(schedule, stages, micro_batches), ordered)
        seconds = timeline.seconds
    else:
        seconds = ordered[0].forward + ordered[0].backward
    optimizer = max(estimator.seconds(trace.optimizer, groups) for trace, groups in traces)
    step_seconds = accumulation * seconds + optimizer
    if pp == 1:
        step_seconds += ordered[0].finish
    nparams, flops = model_args.get_nparams_and_flops(config.training.seq_len)
    return Plan(
        config=config,
        device=device,
        world_size=world_size,
        ranks=[
            estimator.rank_plan(
                rank, stages[rank], trace, groups, micro_batches, accumulation, timeline
            )
            for rank, (trace, groups) in enumerate(traces)
        ],
        step_seconds=step_seconds,
        tokens_per_step=global_batch * config.training.seq_len,
        flops_per_token=flops,
        nparams=nparams,
        accumulation_steps=accumulation,
        timeline=timeline,
    )


def _traceable(config: JobConfig) -> tuple[JobConfig, bool]:
    """The job without compilation, which nothing can be traced through; and whether it had it."""
    config = copy.deepcopy(config)
    compiled, config.compile.enable = config.compile.enable, False
    return config, compiled


Groups = dict[str, list[int]]
"""Name -> numbers of the ranks of a group."""


def _trace_pipeline(
    config: JobConfig, world_size: int, dims: ParallelDims
) -> list[tuple[StepTrace, Groups]]:
    """A trace for each place in the pipeline. Places whose stages are alike share one."""
    ranks_of_place = world_size // dims.pp
    traces: dict[str, tuple[StepTrace, Groups]] = {}
    result = []
    for place in range(dims.pp):
        parts = meta_parts(config, place)
        key = repr([_likeness(part) for part in parts])
        if key not in traces:
            with fake_world(world_size, rank=place * ranks_of_place):
                trace = _trace_deep(config, [repetition_of(part, config) for part in parts])
                groups = ParallelDims.from_config(config.parallelism, world_size).groups()
                ranks = {name: dist.get_process_group_ranks(g) for name, g in groups.items()}
            traces[key] = trace, ranks
        result.append(traces[key])
    return result


def _likeness(part: nn.Module) -> tuple[object, ...]:
    """Equal for stages that cost the same."""
    others = [(name, tuple(p.shape)) for name, p in part.named_parameters() if "layers." not in name]
    return (*others, *layer_signatures(part))


def _trace_deep(config: JobConfig, repetitions: list[Repetition]) -> StepTrace:
    if not any(repetition.worth_extrapolating for repetition in repetitions):
        return trace_step(config)
    return extrapolate(*(trace_step(config, repeats) for repeats in PERIODS), repetitions)


class _Estimator:
    """Durations on one kind of device."""

    def __init__(self, device: Device, host_size: int, compiled: bool) -> None:
        self._device = device
        self._host_size = host_size
        self._compiled = compiled

    def cost(self, stage: StageTrace, groups: Groups) -> StageCost:
        forward = self.seconds(stage.forward, groups)
        first = stage.forward.collectives + stage.start.collectives
        return StageCost(
            forward=forward,
            backward=self.seconds(stage.backward, groups),
            send=self._transfer(stage.hidden_out, groups.get("pp", [0])) if stage.hidden_out else 0,
            activations=stage.activations,
            start=self.seconds(PassTrace(stage.forward.operations, first), groups) - forward,
            finish=self.seconds(stage.finish, groups),
        )

    def seconds(self, trace: PassTrace, groups: Groups) -> float:
        """Of a pass: overlapped communication shows only where it is longer than computing."""
        matrix, other = self.compute(trace)
        waited, overlapped = self._communication(trace.collectives, groups)
        return max(matrix + other + waited, overlapped)

    def compute(self, trace: PassTrace) -> tuple[float, float]:
        """Seconds of matrix products, and of all else."""
        device = self._device
        flops_rate = device.flops * device.matmul_efficiency
        byte_rate = device.bandwidth * device.bandwidth_efficiency
        matrix = other = 0.0
        for operation, calls in trace.operations.items():
            if operation.flops:
                seconds = max(operation.flops / flops_rate, operation.moved / byte_rate)
                matrix += calls * max(seconds, device.launch)
            else:
                share = FUSED if self._compiled else 1.0
                launch = 0.0 if self._compiled else device.launch
                other += calls * max(share * operation.moved / byte_rate, launch)
        return matrix, other

    def _communication(
        self, collectives: Mapping[Collective, float], groups: Groups
    ) -> tuple[float, float]:
        """Seconds that are waited for, and that overlap with computing."""
        waited = overlapped = 0.0
        for collective, calls in collectives.items():
            seconds = calls * self._transfer(collective.sent, groups.get(collective.group, [0]))
            if collective.group in OVERLAPPED:
                overlapped += seconds
            else:
                waited += seconds
        return waited, overlapped

    def _transfer(self, sent: float, ranks: list[int]) -> float:
        return self._device.latency + sent / self._rate(ranks)

    def _rate(self, ranks: list[int]) -> float:
        """Bytes/s of a rank. The ranks of a group on one host share their network cards."""
        device = self._device
        if self.link(ranks) == "host":
            return device.link * device.link_efficiency
        hosts = defaultdict(int)
        for rank in ranks:
            hosts[rank // self._host_size] += 1
        return min(device.link, min(hosts.values()) * device.network) * device.link_efficiency

    def link(self, ranks: list[int]) -> str:
        return "host" if len({rank // self._host_size for rank in ranks}) <= 1 else "network"

    def rank_plan(
        self,
        rank: int,
        stages: list[int],
        trace: StepTrace,
        groups: Groups,
        micro_batches: int,
        accumulation: int,
        timeline: Timeline | None,
    ) -> RankPlan:
        """Args: micro_batches: of one run through the pipeline."""
        matrix = other = waiting = 0.0
        collectives: Counter[Collective] = Counter()
        passes = [(trace.optimizer, 1)]
        for stage in trace.stages:
            passes += [(part, micro_batches * accumulation) for part in (stage.forward, stage.backward)]
            passes += [(part, accumulation if timeline else 1) for part in (stage.start, stage.finish)]
            if timeline and stage.hidden_out:
                sent = Collective("send", "pp", 2, int(stage.hidden_out))
                collectives[sent] += micro_batches * accumulation
            if timeline and stage.hidden_in:
                sent = Collective("send", "pp", 2, int(stage.hidden_in))
                collectives[sent] += micro_batches * accumulation
        for part, times in passes:
            seconds = self.compute(part)
            matrix += times * seconds[0]
            other += times * seconds[1]
            waiting += times * (self.seconds(part, groups) - sum(seconds))
            for collective, calls in part.collectives.items():
                collectives[collective] += times * calls
        return RankPlan(
            pp_rank=rank,
            stages=stages,
            memory=max(_moments(rank, trace, micro_batches, timeline), key=lambda m: m.total),
            compute_seconds=matrix,
            other_seconds=other,
            waiting_seconds=waiting,
            traffic=self._traffic(collectives, groups),
        )

    def _traffic(self, collectives: Mapping[Collective, float], groups: Groups) -> list[Traffic]:
        totals: dict[tuple[str, str, int], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        for collective, times in collectives.items():
            total = totals[collective.group, collective.kind, collective.ranks]
            ranks = groups.get(collective.group, [0])
            total[0] += times
            total[1] += times * collective.sent
            total[2] += times * self._transfer(collective.sent, ranks)
        return [
            Traffic(group, kind, ranks, self.link(groups.get(group, [0])), *total)
            for (group, kind, ranks), total in totals.items()
        ]


def _moments(
    rank: int, trace: StepTrace, micro_batches: int, timeline: Timeline | None
) -> list[Memory]:
    """The fullest moments of the parts of a step, of all stages of a rank."""
    stages = trace.stages
    state = Memory(
        parameters=sum(stage.parameters for stage in stages),
        optimizer_state=sum(stage.optimizer_state for stage in stages),
    )
    # Buffers for all micro-batches: inputs, their gradients, and gradients of outputs.
    buffers = sum(2 * stage.hidden_in + stage.hidden_out for stage in stages)
    pipeline = Memory(pipeline_buffers=micro_batches * buffers if timeline else 0)
    gradients = Memory(gradients=sum(stage.gradients for stage in stages))
    optimizer = state + pipeline + gradients + Memory(temporary=trace.optimizer_temporary)
    if timeline is None:
        return [*(state + moment for moment in stages[0].moments), optimizer]
    working = Memory(activations=timeline.held[rank])
    moments = [optimizer]
    # Stages hold their whole parameters and gradients until the end; one at a time computes.
    kept = sum((replace(s.moments[0], temporary=0) for s in stages), state + pipeline)
    for stage in stages:
        moments.append(kept + working + Memory(temporary=stage.moments[0].temporary))
        for reducing in stage.moments[1:]:
            more = Memory(gradients=reducing.gradients, temporary=reducing.temporary)
            moments.append(kept + more)
    return moments
