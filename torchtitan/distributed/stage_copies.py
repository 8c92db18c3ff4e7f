"""Weights that several pipeline stages have, such as an embedding that is also the output layer.

Each of these stages has a copy. The copies begin equal, and each gets the sum of the gradients of
all of them, so they remain equal. What belongs to the weight only once, such as its share of the
gradient norm and its optimizer state in a checkpoint, goes by the first of its names in the whole
model, and by the stage that has this name. So neither the training nor a checkpoint depends on
whether there is a pipeline.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from operator import attrgetter
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from torchtitan.distributed.dtensor import local_gradient, local_tensor
from torchtitan.distributed.names import canonical_name
from torchtitan.errors import ConfigError


@dataclass(frozen=True)
class SharedWeight:
    """A weight in several pipeline stages."""

    names: tuple[str, ...]
    """All of its names in the whole model, in the order of `named_parameters`."""
    stages: tuple[int, ...]
    """The stage in which each of the names is."""

    @property
    def owner(self) -> int:
        return self.stages[0]

    def name_in(self, stage: int) -> str:
        """Return the weight's name in a stage that has it, the first if there are several."""
        return self.names[self.stages.index(stage)]


@dataclass(frozen=True)
class StageSharing:
    """What a stage shares with others. By default nothing, as a whole model."""

    stage: int = 0
    weights: tuple[SharedWeight, ...] = ()
    """Those of all stages."""
    absent: dict[str, nn.Module | nn.Parameter] = field(default_factory=dict)
    """Modules of other stages, on the meta device, which share weights with this one. By name, an
    attribute of the model."""
    second_names: dict[str, str] = field(default_factory=dict)
    """Name of a module of another stage -> name of one of this stage, if both are one module."""

    @property
    def own(self) -> list[SharedWeight]:
        """The shared weights that this stage has."""
        return [weight for weight in self.weights if self.stage in weight.stages]

    @property
    def copied(self) -> dict[str, str]:
        """Name here -> first name in the whole model, of weights that another stage owns."""
        return {
            weight.name_in(self.stage): weight.names[0]
            for weight in self.own
            if weight.owner != self.stage
        }


def shared_weights(
    model: nn.Module, assignment: Sequence[Sequence[str]]
) -> tuple[SharedWeight, ...]:
    """Return the weights that several stages share.

    Args:
        model: the whole model.
        assignment: the names of the modules of each stage.
    """
    stages = {unit: stage for stage, units in enumerate(assignment) for unit in units}
    names: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(canonical_name(name))
    found = []
    for of_param in names.values():
        if len(of_param) == 1:  # nearly all; a search of plans asks for thousands of layouts
            continue
        where = tuple(_stage_of(name, stages) for name in of_param)
        if len(set(where)) > 1:
            found.append(SharedWeight(tuple(of_param), where))
    return tuple(found)


def _stage_of(parameter: str, stages: dict[str, int]) -> int:
    units = (u for u in stages if parameter == u or parameter.startswith(f"{u}."))
    return stages[next(units)]


def record_sharing(
    part: nn.Module, stage: int, weights: tuple[SharedWeight, ...], model: nn.Module
) -> None:
    """Let a stage, a part of `model` (on the meta device), know the weights that it shares."""
    absent, second_names = {}, {}
    for weight in weights:
        units = [name.partition(".")[0] for name in weight.names]
        stages = list(zip(units, weight.stages, strict=True))
        own = {getattr(model, unit): unit for unit, where in stages if where == stage}
        for unit, where in stages if own else ():
            module = getattr(model, unit)
            if where != stage and module in own:
                second_names[unit] = own[module]
            elif where != stage:
                absent[unit] = copy.deepcopy(module)
    copy_sharing(part, StageSharing(stage, weights, absent, second_names))


def copy_sharing(part: nn.Module, sharing: StageSharing) -> None:
    """Give `part` the record of another module, which it replaces."""
    cast(Any, part).stage_sharing = sharing


def sharing_of(part: nn.Module) -> StageSharing:
    """Return what a stage shares with others."""
    return cast(StageSharing, getattr(part, "stage_sharing", StageSharing()))


@contextmanager
def with_absent_modules(part: nn.Module) -> Iterator[None]:
    """Give a stage, for a while, the modules of other stages that share its weights.

    Its weights then have all the names and the modules that they have in the whole model, in the
    same order. Other weights of these modules are on the meta device.
    """
    sharing = sharing_of(part)
    # torch.compile's wrapper delegates reading, not writing.
    inner: Any = getattr(part, "_orig_mod", part)
    for name, absent in sharing.absent.items():
        setattr(inner, name, absent)
    for name, own in sharing.second_names.items():
        setattr(inner, name, getattr(inner, own))
    for weight in sharing.own:
        param = attrgetter(weight.name_in(sharing.stage))(inner)
        for name, stage in zip(weight.names, weight.stages, strict=True):
            if stage != sharing.stage:
                module, _, own = name.rpartition(".")
                inner.get_submodule(module).register_parameter(own, param)
    try:
        yield
    finally:
        for name in (*sharing.absent, *sharing.second_names):
            setattr(inner, name, None)


def copied_names(part: nn.Module) -> dict[str, str]:
    """Return name in this stage -> first name in the whole model, of copies of others' weights."""
    return sharing_of(part).copied


def stages_that_share(part: nn.Module) -> set[int]:
    """Return the stages that have a weight of this one, including itself."""
    return {stage for weight in sharing_of(part).own for stage in weight.stages}


def shared_parameters(part: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of this stage that other stages have, too."""
    sharing = sharing_of(part)
    return [attrgetter(weight.name_in(sharing.stage))(part) for weight in sharing.own]


def copies_of(model_parts: Sequence[nn.Module]) -> set[nn.Parameter]:
    """Return the parameters of these stages that are copies of another stage's."""
    return {attrgetter(name)(part) for part in model_parts for name in copied_names(part)}


class StageCopies:
    """Keeps the copies of weights equal that several stages have.

    Args:
        model_parts: this rank's stages, as `split_model` made them, parallelized.
        pp_mesh: the ranks that have the other stages; None without a pipeline.
        optimizers: those of the parts.
    """

    def __init__(
        self,
        model_parts: Sequence[nn.Module],
        pp_mesh: DeviceMesh | None,
        optimizers: Iterable[torch.optim.Optimizer],
    ) -> None:
        known = [(part, sharing_of(part)) for part in model_parts]
        self._pp_mesh = pp_mesh
        self._weights = known[0][1].weights
        self._own = [
            [
                (sharing.stage, attrgetter(weight.name_in(sharing.stage))(part))
                for part, sharing in known
                if weight in sharing.own
            ]
            for weight in self._weights
        ]
        """For each weight, the stages of this rank that have it, and their parameters."""
        self._holders: list[list[int]] = []
        """For each weight, the pipeline ranks that have it."""
        self._treatments = [
            sorted({_treatment_of(param, optimizers) for _, param in own}) for own in self._own
        ]
        self.parameters = copies_of(model_parts)
        """Those of this rank that must not be counted, since their owner is counted."""

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Add up the gradients of the copies of each weight. All ranks call this, once a step.

        Raises:
            ConfigError: on all ranks: the stages shard or train a weight differently.
        """
        self._meet()
        for own, holders in zip(self._own, self._holders, strict=True):
            grads = [local_gradient(param) for _, param in own if param.requires_grad]
            if grads:
                total = self._sum(grads, holders)
                for grad in grads:
                    grad.copy_(total)

    @torch.no_grad()
    def spread_weights(self) -> None:
        """Set all copies to the value of their owner's. All ranks call this. Raises: as above."""
        self._meet()
        for weight, own, holders in zip(self._weights, self._own, self._holders, strict=True):
            values = [(stage, local_tensor(param)) for stage, param in own]
            if values:
                total = self._sum(
                    [t if stage == weight.owner else torch.zeros_like(t) for stage, t in values],
                    holders,
                )
                for _, value in values:
                    value.copy_(total)

    def _meet(self) -> None:
        """Find out, once, which ranks have which weight."""
        if self._pp_mesh is None or not self._weights or self._holders:
            return
        found: list[Any] = [None] * self._pp_mesh.size()
        group = self._pp_mesh.get_group()
        dist.all_gather_object(found, self._treatments, group=group)
        # Nothing but to connect the devices: NCCL waits for all ranks of a group at the first call,
        # and the sums are between a few of them.
        dist.all_reduce(torch.zeros((), device=self._pp_mesh.device_type), group=group)
        for weight, of_ranks in zip(self._weights, zip(*found, strict=True), strict=True):
            different = sorted({treatment for of_rank in of_ranks for treatment in of_rank})
            if len(different) > 1:
                raise ConfigError(
                    f"{' and '.join(weight.names)} are one weight, in several pipeline stages, but "
                    "parallelize_fn shards it, or build_optimizer_fn trains it, differently: "
                    f"{' and '.join(different)}. Do both alike in all stages, whichever of the "
                    "names the weight has there, or give each a weight of its own"
                )
            self._holders.append([rank for rank, of_rank in enumerate(of_ranks) if of_rank])

    def _sum(self, tensors: list[torch.Tensor], holders: list[int]) -> torch.Tensor:
        """Return the sum of the tensors of all ranks in `holders`, with equal bits on each."""
        assert self._pp_mesh is not None
        group, rank = self._pp_mesh.get_group(), self._pp_mesh.get_local_rank()
        # Offloaded gradients are on the host.
        own = reduce(torch.add, tensors).to(self._pp_mesh.device_type).contiguous()
        of_rank = {other: own if other == rank else torch.empty_like(own) for other in holders}
        operations = [
            dist.P2POp(operation, tensor, group=group, group_peer=other)
            for other, received in of_rank.items()
            if other != rank and own.numel()
            for operation, tensor in ((dist.isend, own), (dist.irecv, received))
        ]
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()
        return reduce(torch.add, of_rank.values())


def _treatment_of(param: nn.Parameter, optimizers: Iterable[torch.optim.Optimizer]) -> str:
    """Describe what must be equal for copies of a weight, for them to remain equal."""
    treatment = f"{list(local_tensor(param).shape)}"
    if isinstance(param, DTensor):
        # FSDP may also apply to a single rank, in the stages that have experts.
        spread = zip(param.placements, param.device_mesh.shape, strict=True)
        shown = (f"{placement} over {size}" for placement, size in spread if size > 1)
        treatment += f" by {', '.join(shown)}"
    if not param.requires_grad:
        return f"{treatment}, frozen"
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if any(member is param for member in group["params"]):
                plain = {k: v for k, v in sorted(group.items()) if isinstance(v, _PLAIN)}
                settings = ", ".join(f"{name}={value!r}" for name, value in plain.items())
                return f"{treatment}, trained by {type(optimizer).__name__}({settings})"
    return f"{treatment}, in no optimizer"


_PLAIN = bool | int | float | tuple
