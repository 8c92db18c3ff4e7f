"""What a layout costs by arithmetic: rough, but thousands a second."""

from __future__ import annotations

from dataclasses import dataclass

from torchtitan.config import JobConfig
from torchtitan.config.elsewhere import without_machine
from torchtitan.config.validate import validate
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.pipeline_parallel import FIRST_MODULES, LAST_MODULES
from torchtitan.distributed.pipeline_split import assign_modules, stages_of_rank
from torchtitan.errors import ConfigError
from torchtitan.protocols.model import layers_of
from torchtitan.protocols.train_spec import get_train_spec

from .candidates import AC_MODES, STAGES, Candidate, single_layout
from .devices import Device
from .roofline import Roofline
from .trace import fake_world, meta_model, repetition_of, trace_step

_BUBBLE = {"": 0.0, "1F1B": 1.0, "Interleaved1F1B": 0.5, "ZBVZeroBubble": 0.3}
"""Share of 1F1B's bubble that is left."""


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
    """Memory and time of a candidate from one layer's costs.

    Args:
        config: with the global batch and the sequence length of the search.
    """

    def __init__(self, config: JobConfig, device: Device, host_size: int) -> None:
        self._config, self._device, self._host_size = config, device, host_size
        spec = get_train_spec(config.model.name, config.model.flavor)
        args = spec.model_args.update_from_config(config)
        self._nparams, _ = args.get_nparams_and_flops(config.training.seq_len)
        self._dim = getattr(args, "dim", 0)
        self._model = meta_model(single_layout(config))
        layers = list(layers_of(self._model).values())
        self._layers = len(layers)
        self._layer_params = max(sum(p.numel() for p in layer.parameters()) for layer in layers)
        self._shares: dict[tuple[int, str], list[_Share]] = {}
        self._costs = {ac: self._trace_layer(ac) for ac in AC_MODES}

    def _trace_layer(self, ac: str) -> _LayerCost:
        job = without_machine(self._config, 1)  # what several ranks rule out, `plan_run` refuses
        job = Candidate(1, 2, 1, 1, 1, 1, ac, 1, 1, "").config(job)
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
        stages = STAGES[c.schedule]
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
