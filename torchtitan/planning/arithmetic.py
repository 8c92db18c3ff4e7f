"""Estimates the cost of a layout by arithmetic: rough, but thousands of layouts a second."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.nn as nn

from torchtitan.config import JobConfig
from torchtitan.distributed.expert_parallel import moe_layers
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.pipeline_parallel import modules_around_layers
from torchtitan.distributed.pipeline_split import assign_modules, parameters_of, stages_of_rank
from torchtitan.errors import ConfigError
from torchtitan.preflight.portable import without_machine
from torchtitan.preflight.validate import validate
from torchtitan.protocols.model import layers_of
from torchtitan.protocols.train_spec import train_spec_of
from torchtitan.runtime.fake_world import fake_world

from .candidates import AC_MODES, STAGES, Candidate, single_layout
from .collectives import Collective
from .devices import Device
from .extrapolate import extrapolate
from .inputs import TOKEN_IDS, Inputs
from .records import StageTrace
from .repetition import Repetition
from .roofline import Roofline
from .trace import fuses, meta_model, quantizes, repetitions_of, trace_step

_BUBBLE = {"": 0.0, "1F1B": 1.0, "Interleaved1F1B": 0.5, "ZBVZeroBubble": 0.3}
"""Remaining share of 1F1B's bubble."""
_FLOAT32, _BFLOAT16 = 4, 2
"""Bytes of a number as stored and summed, and as used in computation."""
_GATHERED = 8
"""Bytes per parameter of a layer gathered by FSDP, including gradients and the next layer."""
_OF_A_PART = ("send", "all_to_all")
"""Collectives of context parallelism to which a rank gives its part of a sequence, not all."""
_RATES = ("flops", "float8_flops", "float32_flops", "bandwidth")
_INSTANT: dict[str, Any] = dict.fromkeys(_RATES, math.inf)
"""Rates of a device on which a kernel takes no longer than its launch."""
_TP_COLLECTIVES = {"none": 8, "selective": 10, "full": 11}
"""Checkpointing -> collectives of a layer under tensor parallel: into and out of attention and feed
forward, in both passes, plus those that are recomputed."""


@dataclass(frozen=True)
class _LayerCost:
    """Cost of one layer on one sequence, and of the parts before and after the layers."""

    seconds: float
    fixed: float
    """Seconds whatever the number of sequences. Counted for experts, whose weights are large beside
    their tokens."""
    launches: float
    """Seconds that its kernels take at least, however few tokens there are."""
    activations: float
    other_seconds: float
    other_launches: float
    other_bytes: float
    optimizer: float
    """Bytes of the optimizer's state for each byte of gradients."""
    optimizer_products: float
    """Seconds of the optimizer's matrix products, of all ranks and layers together."""


@dataclass(frozen=True)
class _Share:
    """The part of the model on one rank of a pipeline, before tensor parallelism."""

    layers: float
    params: float
    trained: float
    """Parameters that are not frozen."""
    last: bool
    """Whether the rank has the output layer."""


class Arithmetic:
    """Estimates memory and time of a candidate from the costs of one layer.

    Args:
        config: with the global batch and the sequence length of the search.
        inputs: form of a batch.
    """

    def __init__(
        self, config: JobConfig, device: Device, host_size: int, inputs: Inputs = TOKEN_IDS
    ) -> None:
        self._inputs = inputs
        self._config, self._device, self._host_size = config, device, host_size
        self._roofline, self._without_launches, self._of_launches = (
            Roofline(kind, host_size, fuses(config), quantizes(config))
            for kind in (device, replace(device, launch=0.0), replace(device, **_INSTANT))
        )
        spec = train_spec_of(config)
        args = spec.updated_args(config)
        self._around_layers = modules_around_layers(spec.pipeline_fn)
        self._dim = getattr(args, "dim", 0)
        self._model = _model_of(single_layout(config))
        self._nparams, self._trained = _sizes(list(self._model.parameters()))
        experts = [p for layer in moe_layers(self._model) for p in layer.experts.parameters()]
        self._experts = _sizes(experts)[0]
        layers = list(layers_of(self._model).values())
        self._layers = len(layers)
        self._layer_params = max(sum(p.numel() for p in layer.parameters()) for layer in layers)
        self._shares: dict[tuple[int, str], list[_Share]] = {}
        self._costs = {ac: self._trace_layer(ac) for ac in AC_MODES}
        self._exchanges: dict[str, dict[int, Counter[tuple[str, int]]]] = defaultdict(dict)

    def _single_job(self, ac: str) -> JobConfig:
        # `plan_run` refuses settings that are impossible with several ranks.
        job = without_machine(single_layout(self._config, ac), 1)
        job.training.global_batch_size, job.training.batch_size_ramp = -1, []
        validate(job, 2)
        return job

    def _traces(self, job: JobConfig, found: list[Repetition], ranks: int = 2) -> list[StageTrace]:
        with fake_world(ranks, rank=0):
            dims = ParallelDims.from_config(job.parallelism, ranks)
            shallow = range(len(found) + 1)
            return [trace_step(job, n, dims, inputs=self._inputs) for n in shallow]

    def _exchanges_of(self, ac: str, cp: int) -> list[tuple[Collective, float]]:
        """Return what a context rank exchanges of one sequence in all layers, and how often.

        Only the number of a ring's steps depends on that of the ranks, and is linear in it.
        """
        known = self._exchanges[ac]
        is_ring = any(kind == "send" for calls in known.values() for kind, _ in calls)
        if not known or (is_ring and len(known) == 1 and cp not in known):
            known[cp] = self._trace_exchanges(ac, cp)
        first, last = min(known), max(known)
        share = (cp - first) / max(last - first, 1)
        return [
            (
                Collective(kind, "cp", cp, total // (cp if kind in _OF_A_PART else 1)),
                known[first][kind, total] * (1 - share) + known[last][kind, total] * share,
            )
            for kind, total in known[first]
        ]

    def _trace_exchanges(self, ac: str, cp: int) -> Counter[tuple[str, int]]:
        """Count the collectives of `cp` ranks by kind, and by bytes of all ranks together."""
        job = self._single_job(ac)
        job.compile.enable = False
        job.parallelism.context_parallel_degree = cp
        job.parallelism.data_parallel_shard_degree = 1
        found = repetitions_of(_model_of(job, cp), job, self._inputs)
        whole = extrapolate(self._traces(job, found, cp), found)
        calls: Counter[tuple[str, int]] = Counter()
        for passes in (whole.forward, whole.backward):
            for each, number in passes.collectives.items():
                if each.group == "cp":
                    parts = cp if each.kind in _OF_A_PART else 1
                    calls[each.kind, each.payload * parts] += number
        return calls

    def _trace_layer(self, ac: str) -> _LayerCost:
        job = self._single_job(ac)
        job.compile.enable = False
        found = repetitions_of(_model_of(job), job, self._inputs)

        def seconds(stage: StageTrace, roofline: Roofline = self._without_launches) -> float:
            return sum(roofline.compute(stage.forward)) + sum(roofline.compute(stage.backward))

        def of_layer(costs: list[float]) -> float:
            """Return the cost of a layer, on average, from the costs of the traces."""
            if not found:  # too shallow to separate the layers from the rest
                return costs[0] / self._layers
            layers = sum(each.repeats * each.period for each in found)
            few, *more = costs
            pairs = zip(found, more, strict=True)
            return sum(each.repeats * (cost - few) for each, cost in pairs) / layers

        traces = self._traces(job, found)
        whole = extrapolate(traces, found)
        optimizer = whole.optimizer_state / max(whole.gradients, 1)
        products = 2 * self._roofline.compute(whole.optimizer, eager=True)[0]
        layer = of_layer([seconds(trace) for trace in traces])
        launches = of_layer([seconds(trace, self._of_launches) for trace in traces])
        fixed = 0.0
        if self._experts:
            job.training.local_batch_size = 2
            fixed = 2 * layer - of_layer([seconds(trace) for trace in self._traces(job, found)])
        kept = of_layer([trace.activations for trace in traces])
        if not found and self._layers > 1:  # what the backward pass frees from layer to layer
            first, *_, last = whole.moments[-self._layers :]
            kept = (first.activations - last.activations) / (self._layers - 1)
        working = max(moment.activations + moment.temporary for moment in whole.moments)
        other = max(0.0, working - self._layers * kept)
        after = seconds(whole) - self._layers * layer
        launches_after = seconds(whole, self._of_launches) - self._layers * launches
        return _LayerCost(
            seconds=layer - fixed,
            fixed=fixed,
            launches=launches,
            activations=kept,
            other_seconds=after,
            other_launches=launches_after,
            other_bytes=other,
            optimizer=optimizer,
            optimizer_products=products,
        )

    def memory(self, candidate: Candidate) -> float:
        """Return the bytes of the fullest rank."""
        c = candidate
        kept = self._costs[c.ac].activations * self._sequences(c)
        if c.tp > 1:  # of attention and feed forward: gathered inputs, or scattered outputs
            kept += 2 * self._hidden(c) * {"none": c.tp - 1, "selective": 1, "full": 0}[c.ac]
        return self._whole_memory(c, kept) if c.pp == 1 else self._pipeline_memory(c, kept)

    def _whole_memory(self, c: Candidate, kept: float) -> float:
        """Args: kept: bytes of a micro-batch that a layer keeps."""
        cost, shards = self._costs[c.ac], c.shard * c.cp
        # Parameters, gradients and the optimizer's state.
        kept_numbers = self._nparams + (1 + cost.optimizer) * self._trained
        other = self._gathered(c) + self._around_bytes(c)
        return _FLOAT32 * kept_numbers / c.tp / shards + self._layers * kept + other

    def _gathered(self, c: Candidate) -> float:
        """Return the bytes of layers that FSDP has gathered."""
        return min(_GATHERED * self._layer_params / c.tp, self._costs[c.ac].other_bytes)

    def _around_bytes(self, c: Candidate) -> float:
        """Return the bytes of a micro-batch that the parts around the layers need: logits."""
        return (self._costs[c.ac].other_bytes - self._gathered(c)) * self._sequences(c)

    def _pipeline_memory(self, c: Candidate, kept: float) -> float:
        """Args: kept: bytes of a micro-batch that a layer keeps."""
        cost, shards = self._costs[c.ac], c.shard * c.cp
        # Whole parameters and gradients; without FSDP, casts of parameters.
        weight = _FLOAT32 / shards + _BFLOAT16
        trained = _FLOAT32 * cost.optimizer / shards + _FLOAT32
        logits = self._around_bytes(c)
        # Inputs of stages, gradients of inputs, and gradients of outputs.
        buffers = 3 * STAGES[c.schedule] * self._passes(c) * self._hidden(c)
        return buffers + max(
            (weight * rank.params + trained * rank.trained) / c.tp
            + self._flying(c, place) * rank.layers * kept
            + (logits if rank.last else 0.0)
            for place, rank in enumerate(self._ranks(c))
        )

    def _flying(self, c: Candidate, place: int) -> float:
        """Return the number of micro-batches whose activations a rank of a pipeline holds."""
        most = {
            "1F1B": c.pp - place,
            "Interleaved1F1B": (2 * (c.pp - place - 1) + c.pp + 1) / 2,
            "ZBVZeroBubble": c.pp,
        }
        return min(most[c.schedule], self._passes(c))

    def _hidden(self, c: Candidate) -> float:
        """Return the bytes of a micro-batch's hidden states on a rank, between layers."""
        tokens = c.micro_batch * self._config.training.seq_len / c.cp / c.tp
        return tokens * self._dim * _BFLOAT16

    def _sequences(self, c: Candidate) -> float:
        """Return a rank's part of a micro-batch, in sequences."""
        return c.micro_batch / c.tp / c.cp

    def seconds(self, candidate: Candidate) -> float:
        """Return the time of a step, of the optimizer only that of matrix products."""
        c, cost = candidate, self._costs[candidate.ac]
        ranks = c.replicate * c.shard * c.cp * c.tp * c.pp
        return self._seconds_of_passes(c) + cost.optimizer_products / ranks

    def _seconds_of_passes(self, c: Candidate) -> float:
        cost = self._costs[c.ac]
        passes, share = self._passes(c), self._sequences(c)
        layer = max(share * cost.seconds + cost.fixed / c.tp / c.ep, cost.launches)
        layer += self._tensor_parallel_seconds(c) + self.context_parallel_seconds(c) / self._layers
        other = max(share * cost.other_seconds, cost.other_launches)
        # FSDP moves 4 bytes each: twice a parameter in bfloat16, once a gradient in float32.
        own = 1 - self._experts / self._nparams * (1 - 1 / c.ep)  # not of other ranks' experts
        moved = own * _FLOAT32 / c.tp * (1 - 1 / (c.shard * c.cp)) / self._rate(c, c.shard * c.cp)
        if c.pp == 1:
            compute = passes * (self._layers * layer + other)
            return max(compute, passes * moved * (self._nparams + self._trained))
        places = self._ranks(c)
        work = [rank.layers * layer + (other if rank.last else 0.0) for rank in places]
        bubble = _BUBBLE[c.schedule] * (c.pp - 1) * sum(work) / c.pp
        communication = moved * max(rank.params + rank.trained for rank in places)
        return passes * max(work) + bubble + communication

    def _tensor_parallel_seconds(self, c: Candidate) -> float:
        """Return the communication time of a layer and micro-batch."""
        if c.tp == 1:
            return 0.0
        sent = self._hidden(c) * (c.tp - 1)
        once = self._roofline.transfer("all_gather", sent, list(range(c.tp)))
        return _TP_COLLECTIVES[c.ac] * once

    def context_parallel_seconds(self, c: Candidate) -> float:
        """Return the communication time of all layers and a micro-batch."""
        if c.cp == 1:
            return 0.0
        ranks = list(range(0, c.cp * c.tp, c.tp))
        return sum(
            calls * self._roofline.transfer(each.kind, each.sent * c.micro_batch / c.tp, ranks)
            for each, calls in self._exchanges_of(c.ac, c.cp)
        )

    def _rate(self, c: Candidate, ranks: int) -> float:
        """Return the bytes/s of collectives among ranks that are each `c.tp` ranks apart."""
        device, rate = self._device, self._device.link
        if ranks * c.tp > self._host_size:
            mates = max(1, self._host_size // c.tp)  # ranks that use the host's network together
            rate = min(rate, mates * device.network)
        return rate * device.link_efficiency

    def _ranks(self, candidate: Candidate) -> list[_Share]:
        """Return the shares of a pipeline's ranks. Stages have whole layers, so they may differ."""
        key, pp = (candidate.pp, candidate.schedule), candidate.pp
        if key not in self._shares:
            job = candidate.config(self._config)
            try:
                stages = assign_modules(self._model, job, *self._around_layers)
            except ConfigError:  # the trace reports the reason; until then assume an even split
                even = _Share(self._layers / pp, self._nparams / pp, self._trained / pp, False)
                self._shares[key] = [even] * pp
            else:
                self._shares[key] = [
                    self._share_of(stages_of_rank(job, place), stages) for place in range(pp)
                ]
        return self._shares[key]

    def _share_of(self, own: list[int], stages: list[list[str]]) -> _Share:
        """Args: own: numbers of a rank's stages. stages: module names of each of all stages."""
        names = [name for number in own for name in stages[number]]
        params, trained = _sizes([p for name in names for p in parameters_of(self._model, name)])
        layers = sum(name.startswith("layers.") for name in names)
        return _Share(layers, params, trained, last=len(stages) - 1 in own)

    def _passes(self, candidate: Candidate) -> int:
        """Return the number of micro-batches of a rank in a step."""
        data = candidate.replicate * candidate.shard
        return self._config.training.global_batch_size // data // candidate.micro_batch


def _model_of(job: JobConfig, ranks: int = 2) -> nn.Module:
    return meta_model(job, ParallelDims.from_config(job.parallelism, ranks))


def _sizes(params: Sequence[nn.Parameter]) -> tuple[int, int]:
    """Count the elements of all parameters, and of those that are not frozen."""
    return sum(p.numel() for p in params), sum(p.numel() for p in params if p.requires_grad)
