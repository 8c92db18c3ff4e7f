"""The layouts that a search looks at, and what they cost by arithmetic."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torchtitan.config import JobConfig
from torchtitan.config.validate import validate
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.pipeline_parallel import FIRST_MODULES, LAST_MODULES
from torchtitan.distributed.pipeline_split import assign_modules, stages_of_rank
from torchtitan.errors import ConfigError
from torchtitan.protocols.model import layers_of
from torchtitan.protocols.train_spec import get_train_spec

from .devices import Device
from .estimate import traceable
from .roofline import Roofline
from .trace import fake_world, meta_model, repetition_of, trace_step

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
    layers = len(layers_of(meta_model(_single(config))))
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


@dataclass(frozen=True)
class _Share:
    """What a rank of a pipeline has of the model, before tensor parallelism."""

    layers: float
    params: float
    last: bool
    """Whether it has the output layer."""


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
        self._model = meta_model(_single(config))
        layers = list(layers_of(self._model).values())
        self._layers = len(layers)
        self._layer_params = max(sum(p.numel() for p in layer.parameters()) for layer in layers)
        self._shares: dict[tuple[int, str], list[_Share]] = {}
        self._costs = {ac: self._trace_layer(ac) for ac in AC_MODES}

    def _trace_layer(self, ac: str) -> _LayerCost:
        job = Candidate(1, 2, 1, 1, 1, 1, ac, 1, 1, "").config(traceable(self._config))
        job.training.global_batch_size = -1
        validate(job, 2)
        compiled, job.compile.enable = job.compile.enable, False
        roofline = Roofline(self._device, self._host_size, compiled)
        repetition = repetition_of(meta_model(job), job)
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
        shards = c.shard * c.cp
        share = c.micro_batch / c.tp / c.cp
        kept = cost.activations * share
        if c.tp > 1 and c.ac != "full":  # inputs of attention and feed forward, gathered
            kept += 2 * self._hidden(c) * (c.tp - 1)
        if c.pp == 1:
            gathered = min(8 * self._layer_params / c.tp, cost.other_bytes)
            state = 16 * self._nparams / c.tp / shards
            other = gathered + (cost.other_bytes - gathered) * share
            return state + self._layers * kept + other
        # Whole parameters and gradients; without FSDP casts of parameters.
        state = 12 / shards + 6
        stages = _STAGES[c.schedule]
        buffers = 3 * stages * self._passes(c) * self._hidden(c)
        return buffers + max(
            state * rank.params / c.tp + self._flying(c, place) * rank.layers * kept
            for place, rank in enumerate(self._ranks(c))
        )

    def _flying(self, c: Candidate, place: int) -> float:
        """Micro-batches whose activations a rank of a pipeline holds."""
        most = {
            "1F1B": c.pp - place,
            "Interleaved1F1B": (2 * (c.pp - place - 1) + c.pp + 1) / 2,
            "ZBVZeroBubble": c.pp,
        }
        return min(most[c.schedule], self._passes(c))

    def _hidden(self, c: Candidate) -> float:
        """Bytes of the hidden states that a rank has of a micro-batch between layers."""
        return c.micro_batch * self._config.training.seq_len / c.cp / c.tp * self._dim * 2

    def seconds(self, candidate: Candidate) -> float:
        """Of a step."""
        c, cost, device = candidate, self._costs[candidate.ac], self._device
        passes = self._passes(c)
        share = c.micro_batch / c.tp / c.cp
        link = device.link * device.link_efficiency
        layer, other = share * cost.seconds, share * cost.other_seconds
        if c.tp > 1:
            moved = self._hidden(c) * (c.tp - 1)
            layer += (10 if c.ac == "full" else 8) * (moved / link + device.latency)
        ranks = c.shard * c.cp * c.tp
        rate = link
        if ranks > self._host_size:
            mates = max(1, self._host_size // c.tp)
            rate = min(device.link, mates * device.network) * device.link_efficiency
        moved = 8 / c.tp * (1 - 1 / (c.shard * c.cp))
        if c.pp == 1:
            compute = passes * (self._layers * layer + other)
            return max(compute, passes * moved * self._nparams / rate)
        places = self._ranks(c)
        work = [rank.layers * layer + (other if rank.last else 0.0) for rank in places]
        bubble = _BUBBLE[c.schedule] * (c.pp - 1) * sum(work) / c.pp
        communication = moved * max(rank.params for rank in places) / rate
        return passes * max(work) + bubble + communication

    def _ranks(self, candidate: Candidate) -> list[_Share]:
        """What the ranks of a pipeline have. Stages are of whole layers, so some have more."""
        key = candidate.pp, candidate.schedule
        if key not in self._shares:
            job = candidate.config(self._config)
            try:
                stages = assign_modules(self._model, job, FIRST_MODULES, LAST_MODULES)
            except ConfigError:  # the trace says why; until then take it for even
                part = _Share(self._layers / candidate.pp, self._nparams / candidate.pp, False)
                self._shares[key] = [part] * candidate.pp
                return self._shares[key]
            sizes = {
                name: sum(p.numel() for p in self._model.get_submodule(name).parameters())
                for names in stages
                for name in names
            }
            own = [
                [name for stage in stages_of_rank(job, place) for name in stages[stage]]
                for place in range(candidate.pp)
            ]
            self._shares[key] = [
                _Share(
                    layers=sum(name.startswith("layers.") for name in names),
                    params=sum(sizes[name] for name in names),
                    last=stages[-1][-1] in names,
                )
                for names in own
            ]
        return self._shares[key]

    def _passes(self, candidate: Candidate) -> int:
        """Micro-batches of a rank in a step."""
        data = candidate.replicate * candidate.shard
        return self._config.training.global_batch_size // data // candidate.micro_batch
