"""Turns traces into a plan: memory and time of each pipeline rank, and of the whole step.

Memory is counted, time comes from a roofline, and the pipeline's schedule is simulated.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
import torch.nn as nn

from torchtitan.components.weight_flops import flops_of_weights
from torchtitan.config import JobConfig, fail
from torchtitan.config.batch import batch_sizes
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.pipeline_split import splits_backward
from torchtitan.distributed.stage_copies import stages_that_share
from torchtitan.preflight.model_fit import valid_spec
from torchtitan.preflight.portable import without_machine
from torchtitan.protocols.model import layers_of
from torchtitan.protocols.model_converter import build_model_converters
from torchtitan.runtime.fake_world import fake_world

from .collectives import Collective
from .devices import Device
from .extrapolate import extrapolate
from .inputs import Inputs
from .memory import Memory
from .pipeline_memory import moments
from .plan import Plan, RankPlan
from .records import PassTrace, StageTrace
from .repetition import layer_signatures, layers_left_out
from .roofline import Groups, Roofline
from .schedule import (
    BACKWARD,
    FORWARD,
    INPUT,
    WEIGHT,
    Action,
    Timeline,
    actions_of,
    play,
)
from .trace import (
    fuses,
    meta_model,
    meta_parts,
    quantizes,
    repetitions_of,
    stages_at,
    trace_optimizer,
    trace_step,
)


@dataclass
class RankTrace:
    """The work of a rank in a step."""

    stages: dict[int, StageTrace]
    """By their numbers."""
    groups: Groups
    partners: int = 0
    """Other ranks of the pipeline that share weights with this one."""
    first: int = 0
    """The first rank at this place in the pipeline."""

    @property
    def shared_gradients(self) -> float:
        """Bytes that this rank exchanges with each partner."""
        return sum(stage.shared_gradients for stage in self.stages.values())

    @property
    def optimizer(self) -> PassTrace:
        """The optimizer's step on all stages, and what it needs before: the clipping, and the sums
        of gradients of shared weights.
        """
        whole = PassTrace()
        for stage in self.stages.values():
            for part in (stage.clipping, stage.optimizer):
                whole.operations.update(part.operations)
                whole.collectives.update(part.collectives)
        if self.partners and self.shared_gradients:
            whole.collectives[Collective("send", "pp", 2, int(self.shared_gradients))] += (
                self.partners
            )
        return whole


Traces = dict[object, StageTrace]
"""Cached costs of stages, by kind of stage and kind of job: see `_trace_pipeline`."""


def plan_run(
    config: JobConfig,
    world_size: int,
    device: Device,
    host_size: int = 8,
    known: Traces | None = None,
    inputs: Inputs | None = None,
) -> Plan:
    """Trace the distinct stages of a run, and estimate it.

    Args:
        host_size: devices of a host.
        known: traces of previous runs, which are reused where possible, and added to.
        inputs: form of a batch, if already known.

    Raises:
        ConfigError: the job is not valid for the world, or the form of a batch cannot be
            determined.
    """
    inputs = inputs or Inputs.of(config)
    given, config = config, without_machine(config, world_size)
    spec = valid_spec(config, world_size)
    model_args = spec.updated_args(config)
    dims = ParallelDims.from_config(config.parallelism, world_size)
    _refuse_unplannable(config, device, dims)
    model = meta_model(config, dims)
    known = {} if known is None else known
    traces = _trace_pipeline(model, config, world_size, dims, known, inputs)
    roofline = Roofline(device, host_size, fuses(config), quantizes(config))
    step = _Step(config, dims, roofline, traces)
    flops = model_args.get_nparams_and_flops(config.training.seq_len)[1]
    flops += flops_of_weights(model) - flops_of_weights(spec.meta_model(model_args))
    return Plan(
        config=given,
        device=device,
        dims=dims,
        ranks=[step.rank_plan(rank) for rank in range(dims.pp)],
        step_seconds=step.seconds,
        pass_seconds=step.pass_seconds,
        tokens_per_step=step.global_batch * config.training.seq_len,
        flops_per_token=flops,
        nparams=sum(param.numel() for param in model.parameters()),
        accumulation_steps=step.accumulation,
        timeline=step.timeline,
    )


def _refuse_unplannable(config: JobConfig, device: Device, dims: ParallelDims) -> None:
    converters: list[Any] = build_model_converters(config, dims).converters
    for converter in converters:
        if hasattr(converter, "require_capability") and not converter.options.emulate:
            converter.require_capability(device.capability, device.name)
    if config.training.enable_cpu_offload:
        fail(
            config,
            "training.enable_cpu_offload",
            "cannot be planned, because host memory and its link are not modelled. Set it to "
            "false to see what the device would need",
        )
    if config.parallelism.pipeline_parallel_schedule_csv:
        fail(
            config,
            "parallelism.pipeline_parallel_schedule_csv",
            "cannot be planned. Leave it empty, and set parallelism.pipeline_parallel_schedule to "
            "a similar one",
        )
    if config.activation_checkpoint.mode == "memory_budget":
        fail(
            config,
            "activation_checkpoint.mode",
            "cannot be planned, because the compiler decides. 'full' and 'none' are its bounds, "
            "and 'selective' is between them",
        )


def _trace_pipeline(
    model: nn.Module,
    config: JobConfig,
    world_size: int,
    dims: ParallelDims,
    known: Traces,
    inputs: Inputs,
) -> list[RankTrace]:
    """Return the trace of each place in the pipeline, joined from the traces of its stages.

    Stages that are alike share a trace, whatever the schedule and the number of micro-batches.
    """
    signatures = layer_signatures(model, config.training.seq_len, inputs)
    layers = dict(zip(layers_of(model), signatures, strict=True))
    job = _schedule_free(config)
    place_of = {stage: place for place in range(dims.pp) for stage in stages_at(config, place)}
    result = []
    for place in range(dims.pp):
        found, first = [], place * (world_size // dims.pp)
        stages = stages_at(config, place)
        parts = meta_parts(model, config, stages)
        for stage, part in zip(stages, parts, strict=True):
            key = world_size, job, _likeness(part, layers)
            if key not in known:
                with fake_world(world_size, rank=first):
                    known[key] = _trace_deep(config, part, stage, inputs, layers, known)
            found.append(known[key])
        groups = {
            name: ranks
            for trace in found
            for name, ranks in _moved(trace.groups, first, world_size // dims.pp)
        }
        partners = {place_of[other] for part in parts for other in stages_that_share(part)}
        of_stages = dict(zip(stages, found, strict=True))
        result.append(RankTrace(of_stages, groups, len(partners - {place}), first))
    return result


def _moved(groups: Groups, first: int, of_place: int) -> Iterator[tuple[str, list[int]]]:
    """Yield the groups of rank `first`, from those of the first rank of any place in the pipeline.

    Other places may be cut by the ends of hosts elsewhere. Groups across places are the same.

    Args: of_place: ranks at each place.
    """
    for name, ranks in groups.items():
        fixed = ranks[-1] - ranks[0] >= of_place
        yield name, ranks if fixed else [rank - ranks[0] + first for rank in ranks]


def _schedule_free(config: JobConfig) -> str:
    """Return a key that is equal for jobs whose like stages cost the same."""
    if config.parallelism.pipeline_parallel_degree > 1:
        split, config = splits_backward(config), copy.deepcopy(config)
        config.parallelism.pipeline_parallel_schedule = "ZBVZeroBubble" if split else "1F1B"
        config.parallelism.pipeline_parallel_stages_per_rank = -1
        config.training.local_batch_size = config.training.global_batch_size = -1
    return repr(config)


def _likeness(part: nn.Module, layers: Mapping[str, str], left_out: Sequence[str] = ()) -> object:
    """Return a key that is equal for stages that cost the same.

    Args:
        layers: signature of each layer of the whole model.
        left_out: layers that the stage is without.
    """
    others = [
        (name, tuple(p.shape), p.requires_grad)
        for name, p in part.named_parameters()
        if "layers." not in name
    ]
    return (*others, *(layers[name] for name in layers_of(part) if name not in left_out))


def _trace_deep(
    config: JobConfig,
    part: nn.Module,
    stage: int,
    inputs: Inputs,
    layers: Mapping[str, str],
    known: Traces,
) -> StageTrace:
    """Trace a stage, whose model is `part`, within a `fake_world`.

    Stages with more or fewer of the same layers are extrapolated from the same traces.

    Args:
        layers, known: see `_likeness` and `plan_run`.
    """
    world_size, job = dist.get_world_size(), _schedule_free(config)
    dims = ParallelDims.from_config(config.parallelism, world_size)
    found = repetitions_of(part, config, inputs)
    traces = []
    for shallow, longer in enumerate([None, *found]):
        left_out = layers_left_out(part, found, longer)
        key = world_size, job, _likeness(part, layers, left_out)
        if key not in known:
            known[key] = trace_step(config, shallow, dims, stage=stage, inputs=inputs)
        traces.append(known[key])
    whole = extrapolate(traces, found)
    # Rounded moments are made exact for some parameters at a time, however many there are.
    if found and (whole.exchanged or config.optimizer.state_dtype != "float32"):
        trace_optimizer(whole, config, dims, stage, inputs)
    return whole


class _Step:
    """A simulated step of all ranks of the pipeline: its time, and the needs of each rank."""

    def __init__(
        self, config: JobConfig, dims: ParallelDims, roofline: Roofline, ranks: list[RankTrace]
    ) -> None:
        self._roofline, self._ranks = roofline, ranks
        sizes = batch_sizes(config, dims.dp)
        self.global_batch, self.accumulation = sizes.largest, sizes.most_passes
        pipeline = dims.pp > 1
        self._first = {number: rank.first for rank in ranks for number in rank.stages}
        costs = {
            number: roofline.cost(
                stage, rank.groups | {"pp": self._pair(number, number + 1)}, pipeline
            )
            for rank in ranks
            for number, stage in rank.stages.items()
        }
        self._costs = [costs[number] for number in sorted(costs)]
        self._micro_batches = 1  # in one run through the pipeline
        self._actions = {0: [Action(0, FORWARD, 0), Action(0, BACKWARD, 0)]}
        self.timeline: Timeline | None = None
        if pipeline:
            size = config.parallelism.pipeline_parallel_microbatch_size
            self._micro_batches = config.training.local_batch_size // size
            self._actions = actions_of(
                config.parallelism.pipeline_parallel_schedule,
                [list(rank.stages) for rank in ranks],
                self._micro_batches,
                splits_backward(config),
            )
            self.timeline = play(self._actions, self._costs)
            self.pass_seconds, finish = self.timeline.seconds, 0.0
        else:
            whole = self._costs[0]
            self.pass_seconds, finish = whole.forward + whole.backward, whole.finish
        seconds = self.accumulation * self.pass_seconds + finish
        self.seconds = seconds + max(self._optimizer_seconds(rank) for rank in ranks)

    def _pair(self, stage: int, other: int) -> list[int]:
        """Return a rank of a stage, and that of another with which it exchanges micro-batches."""
        return [self._first[stage], self._first.get(other, self._first[stage])]

    def _optimizer_seconds(self, rank: RankTrace) -> float:
        return self._roofline.seconds_of_optimizer(rank.optimizer, rank.groups)

    def rank_plan(self, place: int) -> RankPlan:
        rank, optimizer = self._ranks[place], self._ranks[place].optimizer
        matrix = other = waiting = 0.0
        groups, link = dict(rank.groups), self._roofline.link
        collectives: Counter[Collective] = Counter()
        runs = self.accumulation
        passes = [(optimizer, 1, self._optimizer_seconds(rank))]
        for number, stage in rank.stages.items():
            cost = self._costs[number]
            own = [action for action in self._actions[place] if action.stage == number]
            kinds = Counter(action.kind for action in own)
            passes += [
                (stage.forward, runs * kinds[FORWARD], cost.forward),
                (stage.backward, runs * kinds[BACKWARD], cost.backward),
                (stage.inputs, runs * kinds[INPUT], cost.inputs),
                (stage.weights, runs * kinds[WEIGHT], cost.weights),
                (stage.start, runs * sum(action.gathers for action in own), cost.start),
                (stage.finish, runs if self.timeline else 1, cost.finish),
            ]
            for size, receiver in ((stage.hidden_out, number + 1), (stage.hidden_in, number - 1)):
                if size and receiver not in rank.stages:  # of a V, two stages are on one rank
                    each, pair = runs * kinds[FORWARD], self._pair(number, receiver)
                    name = "pp"
                    if link(pair) != link(groups.get(name, pair)):  # of a pipeline over hosts
                        name = "pp on a host"
                        groups[name] = pair
                    collectives[Collective("send", name, 2, int(size))] += each
        for part, times, length in passes:
            seconds = self._roofline.compute(part, eager=part is optimizer)
            matrix += times * seconds[0]
            other += times * seconds[1]
            waiting += times * (length - sum(seconds))
            for collective, calls in part.collectives.items():
                collectives[collective] += times * calls
        return RankPlan(
            pp_rank=place,
            stages=list(rank.stages),
            memory=max(self._moments(place), key=lambda m: m.total),
            compute_seconds=matrix,
            other_seconds=other,
            waiting_seconds=waiting,
            traffic=self._roofline.traffic(collectives, groups),
        )

    def _moments(self, place: int) -> list[Memory]:
        """Return the fullest moment of each part of a step, for all stages of a rank."""
        rank = self._ranks[place]
        of_rank = rank.stages
        stages = of_rank.values()
        state = Memory(
            parameters=sum(stage.parameters for stage in stages),
            optimizer_state=sum(stage.optimizer_state for stage in stages),
        )
        gradients = Memory(gradients=sum(stage.gradients for stage in stages))
        # Gradients of shared weights: one from each partner, and the sum.
        exchanged = (rank.partners + 1) * rank.shared_gradients
        # The stages' optimizers step one after the other.
        in_optimizer = max(stage.optimizer_temporary for stage in stages)
        temporary = Memory(temporary=max(in_optimizer, exchanged))
        if self.timeline is None:
            optimizer = state + gradients + temporary
            return [*(state + moment for moment in of_rank[0].moments), optimizer]
        # Buffers for all micro-batches: inputs, gradients of inputs, and gradients of outputs.
        buffers = sum(2 * stage.hidden_in + stage.hidden_out for stage in stages)
        state += Memory(pipeline_buffers=self._micro_batches * buffers)
        accumulates = self.accumulation > 1
        sharded = any(stage.between.whole_gradients for stage in stages)
        before = state + gradients if accumulates and sharded else state
        in_passes = moments(self._actions[place], of_rank, accumulates)
        return [state + gradients + temporary, *(before + moment for moment in in_passes)]
