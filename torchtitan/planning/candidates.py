"""The layouts that a search looks at, and what they cost by arithmetic."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torchtitan.models  # noqa: F401  (fills the registry)
from torchtitan.config import JobConfig
from torchtitan.config.validate import validate
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.protocols.model import layers_of
from torchtitan.protocols.train_spec import get_train_spec

from .devices import Device
from .estimate import traceable
from .roofline import Roofline
from .trace import fake_world, meta_parts, repetition_of, trace_step

AC_MODES = ("none", "selective", "full")
SCHEDULES = ("1F1B", "Interleaved1F1B", "ZBVZeroBubble")
_STAGES = {"": 1, "1F1B": 1, "Interleaved1F1B": 2, "ZBVZeroBubble": 2}
_BUBBLE = {"": 0.0, "1F1B": 1.0, "Interleaved1F1B": 0.5, "ZBVZeroBubble": 0.3}
"""Share of 1F1B's bubble that is left."""
_MICRO_BATCHES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Candidate:
    """One layout. The global batch is that of the search."""

    replicate: int
    shard: int
    cp: int
    tp: int
    pp: int
    ep: int
    ac: str
    local_batch: int
    micro_batch: int
    schedule: str
    """"" without a pipeline."""

    def config(self, job: JobConfig) -> JobConfig:
        config = copy.deepcopy(job)
        parallelism: Any = config.parallelism
        checkpointing: Any = config.activation_checkpoint
        parallelism.data_parallel_replicate_degree = self.replicate
        parallelism.data_parallel_shard_degree = self.shard
        parallelism.context_parallel_degree = self.cp
        parallelism.tensor_parallel_degree = self.tp
        parallelism.pipeline_parallel_degree = self.pp
        parallelism.expert_parallel_degree = self.ep
        parallelism.expert_tensor_parallel_degree = 1
        parallelism.pipeline_parallel_split_points = []
        parallelism.pipeline_parallel_stages_per_rank = -1
        parallelism.pipeline_parallel_schedule_csv = ""
        parallelism.fsdp_reshard_after_forward = "default"
        if self.pp > 1:
            parallelism.pipeline_parallel_schedule = self.schedule
            parallelism.pipeline_parallel_microbatch_size = self.micro_batch
        config.training.local_batch_size = self.local_batch
        checkpointing.mode = self.ac
        checkpointing.selective_ac_option = "op"
        return config

    def __str__(self) -> str:
        degrees = {"replicate": self.replicate, "shard": self.shard, "cp": self.cp, "tp": self.tp}
        degrees |= {"pp": self.pp, "ep": self.ep}
        return " x ".join(f"{name} {size}" for name, size in degrees.items() if size > 1) or "one"


def candidates(config: JobConfig, world_size: int, host_size: int) -> Iterator[Candidate]:
    """All that the arithmetic of degrees and batches allows.

    Tensor parallel stays within a host, and context parallel leaves a rank 2048 tokens or more.
    """
    spec = get_train_spec(config.model.name, config.model.flavor)
    args = spec.model_args.update_from_config(config)
    layers = len(layers_of(meta_parts(_single(config), 0)[0]))
    batch, seq = config.training.global_batch_size, config.training.seq_len
    for tp in _divisors(host_size, world_size):
        for cp in [c for c in _divisors(8, world_size // tp) if c == 1 or seq // c >= 2048]:
            stages = world_size // tp // cp if spec.pipeline_fn is not None else 1
            for pp in [p for p in _divisors(stages, stages) if p <= layers]:
                data = world_size // tp // cp // pp
                if batch % data:
                    continue
                for replicate in _divisors(data, data):
                    shard = data // replicate
                    for ep in _divisors(args.num_experts or 1, shard * cp * tp):
                        degrees = (replicate, shard, cp, tp, pp, ep)
                        yield from _batches(degrees, batch // data, layers)


def _batches(
    degrees: tuple[int, int, int, int, int, int], batch: int, layers: int
) -> Iterator[Candidate]:
    """Args: batch: sequences of a data rank in a step."""
    pp = degrees[4]
    for ac in AC_MODES:
        for size in [b for b in _MICRO_BATCHES if batch % b == 0]:
            if pp == 1:
                yield Candidate(*degrees, ac, size, size, "")
                continue
            for schedule in SCHEDULES:
                if pp * _STAGES[schedule] > layers or batch // size < pp * _STAGES[schedule]:
                    continue
                if schedule == "ZBVZeroBubble" and ac == "selective":
                    continue  # it has two backward passes, see config/validate.py
                yield Candidate(*degrees, ac, batch, size, schedule)


def _divisors(number: int, of: int) -> list[int]:
    """Of `of`, up to `number`, which they divide too."""
    return [d for d in range(1, number + 1) if number % d == 0 and of % d == 0]


def _single(config: JobConfig) -> JobConfig:
    return Candidate(1, 2, 1, 1, 1, 1, "none", 1, 1, "").config(config)


@dataclass(frozen=True)
class _LayerCost:
    """Of one layer on one sequence, and of what comes before and after the layers."""

    seconds: float
    activations: float
    other_seconds: float
    other_bytes: float


class Arithmetic:
    """Memory and time of a candidate from one layer's costs: rough, but thousands a second.

    Args:
        config: with the global batch and the sequence length of the search.
    """

    def __init__(self, config: JobConfig, device: Device, host_size: int) -> None:
        self._config, self._device, self._host_size = config, device, host_size
        spec = get_train_spec(config.model.name, config.model.flavor)
        args = spec.model_args.update_from_config(config)
        self._nparams, _ = args.get_nparams_and_flops(config.training.seq_len)
        self._dim = getattr(args, "dim", 0)
        self._layers = len(layers_of(meta_parts(_single(config), 0)[0]))
        self._costs = {ac: self._trace_layer(ac) for ac in AC_MODES}

    def _trace_layer(self, ac: str) -> _LayerCost:
        job = Candidate(1, 2, 1, 1, 1, 1, ac, 1, 1, "").config(traceable(self._config))
        job.training.global_batch_size = -1
        validate(job, 2)
        compiled, job.compile.enable = job.compile.enable, False
        roofline = Roofline(self._device, self._host_size, compiled)
        repetition = repetition_of(meta_parts(job, 0)[0], job)
        with fake_world(2, rank=0):
            dims = ParallelDims.from_config(job.parallelism, 2)
            stages = [trace_step(job, shallow, dims).stages[0] for shallow in (0, 1)]
        depths = [
            repetition.depth(repeats) if repetition.worth_extrapolating else self._layers
            for repeats in repetition.traced
        ]
        seconds = [
            sum(roofline.compute(stage.forward)) + sum(roofline.compute(stage.backward))
            for stage in stages
        ]
        if depths[0] == depths[1]:  # too shallow to be taken apart
            share = stages[0].activations / depths[0]
            return _LayerCost(seconds[0] / depths[0], share, 0.0, 0.0)
        step = depths[1] - depths[0]
        layer = (seconds[1] - seconds[0]) / step
        kept = (stages[1].activations - stages[0].activations) / step
        working = max(moment.activations + moment.temporary for moment in stages[0].moments)
        return _LayerCost(
            layer, kept, seconds[0] - depths[0] * layer, max(0.0, working - depths[0] * kept)
        )

    def memory(self, candidate: Candidate) -> float:
        """Bytes of the fullest rank."""
        c, cost = candidate, self._costs[candidate.ac]
        part = self._nparams / c.tp / c.pp
        shards = c.shard * c.cp
        state = 12 * part / shards
        if c.pp > 1:
            state += 6 * part if shards > 1 else 4 * part
        share = c.micro_batch / c.tp / c.cp
        flying = 1.0
        if c.pp > 1:
            flying = min(c.pp * (1.5 if c.schedule == "Interleaved1F1B" else 1.0), self._passes(c))
        kept = flying * self._layers / c.pp * cost.activations * share
        return state + kept + (cost.other_bytes * share if c.pp == 1 else 0.0)

    def seconds(self, candidate: Candidate) -> float:
        """Of a step."""
        c, cost, device = candidate, self._costs[candidate.ac], self._device
        training = self._config.training
        passes = self._passes(c)
        share = c.micro_batch / c.tp / c.cp / c.pp
        compute = passes * share * (self._layers * cost.seconds + cost.other_seconds)
        link = device.link * device.link_efficiency
        if c.tp > 1:
            hidden = c.micro_batch * training.seq_len / c.cp * self._dim * 2 * (c.tp - 1) / c.tp
            calls = (10 if c.ac == "full" else 8) * self._layers / c.pp
            compute += passes * calls * (hidden / link + device.latency)
        if c.pp > 1:
            compute *= 1 + _BUBBLE[c.schedule] * (c.pp - 1) / passes
        ranks = c.shard * c.cp * c.tp
        rate = link
        if ranks > self._host_size:
            mates = max(1, self._host_size // c.tp)
            rate = min(device.link, mates * device.network) * device.link_efficiency
        gathers = 1 if c.pp > 1 else passes
        moved = 8 * self._nparams / c.tp / c.pp * (1 - 1 / (c.shard * c.cp))
        communication = gathers * moved / rate
        return compute + communication if c.pp > 1 else max(compute, communication)

    def _passes(self, candidate: Candidate) -> int:
        """Micro-batches of a rank in a step."""
        data = candidate.replicate * candidate.shard
        return self._config.training.global_batch_size // data // candidate.micro_batch
