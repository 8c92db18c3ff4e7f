"""Assign modules to pipeline stages, and stages to ranks."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import ClassVar, cast

import torch.nn as nn

from torchtitan.config import JobConfig
from torchtitan.config.load import fail
from torchtitan.distributed.stage_copies import record_sharing, shared_weights
from torchtitan.errors import did_you_mean
from torchtitan.protocols.model import layers_of
from torchtitan.tools.logging import logger

SCHEDULE_KINDS = {
    "GPipe": "single",
    "1F1B": "single",
    "Interleaved1F1B": "looped",
    "LoopedBFS": "looped",
    "InterleavedZeroBubble": "looped",
    "ZBVZeroBubble": "V",
    "DualPipeV": "V",
}
"""`single`: a rank has one stage. `looped`: a rank has two or more, which go around the ranks: rank
r has stages r, r + pp, ... `V`: a rank has two, which go forth and back: rank r has
stages r and 2 pp - 1 - r."""


SPLIT_BACKWARD_SCHEDULES = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
"""Schedules that fill the bubble by computing gradients of inputs first and of weights later."""


@dataclass
class CsvSchedule:
    """`parallelism.pipeline_parallel_schedule_csv`: one row per rank, with actions like `1F0`."""

    KEY: ClassVar = "parallelism.pipeline_parallel_schedule_csv"
    stages: list[list[int]]
    """The stages of each rank, ascending."""
    microbatches: int
    splits_backward: bool

    @classmethod
    def read(cls, job_config: JobConfig) -> CsvSchedule:
        """Read the file. Raise `ConfigError` if it is missing, or no schedule for this degree."""
        parallelism = job_config.parallelism
        try:
            text = Path(parallelism.pipeline_parallel_schedule_csv).read_text()
        except (OSError, UnicodeDecodeError) as error:
            fail(job_config, cls.KEY, f"cannot be read: {error}")
        rows = [
            [(int(s), kind, int(m)) for s, kind, m in _ACTION.findall(row)]
            for row in text.splitlines()
            if row.strip()
        ]
        stages = [sorted({stage for stage, _, _ in row}) for row in rows]
        every = sorted(stage for row in stages for stage in row)
        pp = parallelism.pipeline_parallel_degree
        if len(rows) != pp or not all(rows) or every != list(range(len(every))):
            fail(
                job_config,
                cls.KEY,
                f"must have a row of actions like 0F0 for each of the {pp} ranks, with each stage "
                f"from 0 on in exactly one of them. It has {len(rows)} rows, with the stages "
                f"{stages}",
            )
        if len({len(row) for row in stages}) > 1:
            fail(
                job_config, cls.KEY, f"every rank must have the same number of stages, not {stages}"
            )
        microbatches = 1 + max(microbatch for row in rows for _, _, microbatch in row)
        return cls(stages, microbatches, any(kind in "IW" for row in rows for _, kind, _ in row))


_ACTION = re.compile(r"\b(\d+)([FBIW])(\d+)\b")


def schedule_splits_backward(job_config: JobConfig) -> bool:
    """Whether the schedule has actions for the gradients of inputs, and later ones for weights."""
    parallelism = job_config.parallelism
    if parallelism.pipeline_parallel_degree == 1:
        return False
    if parallelism.pipeline_parallel_schedule_csv:
        return CsvSchedule.read(job_config).splits_backward
    return parallelism.pipeline_parallel_schedule in SPLIT_BACKWARD_SCHEDULES


def splits_backward(job_config: JobConfig) -> bool:
    """Whether backward passes are split as in `schedule_splits_backward`.

    Not those of compiled or checkpointed blocks. A compiled block has one backward function, which
    both passes would run. A checkpointed block would be recomputed by the first pass, and again for
    each of its matrices by the second. The first action then runs the whole backward pass.
    """
    whole = job_config.activation_checkpoint.mode != "none" or job_config.compile.compiles("model")
    return not whole and schedule_splits_backward(job_config)


def stages_per_rank(job_config: JobConfig) -> int:
    """Return the configured number of stages per rank, or the fewest that the schedule needs."""
    parallelism = job_config.parallelism
    if parallelism.pipeline_parallel_schedule_csv:
        return len(CsvSchedule.read(job_config).stages[0])
    if parallelism.pipeline_parallel_stages_per_rank != -1:
        return parallelism.pipeline_parallel_stages_per_rank
    return 1 if SCHEDULE_KINDS[parallelism.pipeline_parallel_schedule] == "single" else 2


def stages_of_rank(job_config: JobConfig, pp_rank: int) -> list[int]:
    """Return the numbers of the stages of a pipeline rank, ascending."""
    parallelism = job_config.parallelism
    if parallelism.pipeline_parallel_schedule_csv:
        return CsvSchedule.read(job_config).stages[pp_rank]
    pp, count = parallelism.pipeline_parallel_degree, stages_per_rank(job_config)
    if SCHEDULE_KINDS[parallelism.pipeline_parallel_schedule] == "V":
        return [pp_rank, 2 * pp - 1 - pp_rank]
    return [pp_rank + i * pp for i in range(count)]


def split_model(
    model: nn.Module,
    job_config: JobConfig,
    stages: list[int],
    first_modules: tuple[str, ...],
    last_modules: tuple[str, ...],
) -> list[nn.Module]:
    """Return the parts of `model` (on the meta device) that belong to `stages`.

    See `build_pipeline` for the arguments and errors. Modules without parameters are in every part.
    """
    assignment = assign_modules(model, job_config, first_modules, last_modules)
    for stage, names in enumerate(assignment):
        run = " to ".join(dict.fromkeys((names[0], names[-1])))
        logger.info("pipeline stage %d of %d: %s", stage, len(assignment), run)
    units = [name for names in assignment for name in names]
    parts = [_part(model, units, assignment[stage]) for stage in stages]
    weights = shared_weights(model, assignment)
    for stage, part in zip(stages, parts, strict=True):
        record_sharing(part, stage, weights, model)
    return parts


def assign_modules(
    model: nn.Module,
    job_config: JobConfig,
    first_modules: tuple[str, ...],
    last_modules: tuple[str, ...],
) -> list[list[str]]:
    """Return the names of the modules of each pipeline stage, in the order of the model.

    See `build_pipeline` for the arguments and errors.
    """
    layers = [f"layers.{name}" for name in layers_of(model)]
    first, last = (
        [name for name in names if getattr(model, name, None) is not None]
        for names in (first_modules, last_modules)
    )
    units = [*first, *layers, *last]
    _refuse_other_parameters(model, units, job_config)

    number = job_config.parallelism.pipeline_parallel_degree * stages_per_rank(job_config)
    points = job_config.parallelism.pipeline_parallel_split_points
    if points:
        cuts = _cuts_at(points, units, number, job_config)
    else:
        if number > len(layers):
            fail(
                job_config,
                "parallelism.pipeline_parallel_degree",
                f"{number} stages, but the model has only {len(layers)} layers. Use at most "
                f"{len(layers)} stages (degree x stages per rank)",
            )
        costs = _costs(model, units, len(first), len(last), job_config)
        # Modules before the layers stay together, and those after them, because each model combines
        # them its own way.
        together, after = max(len(first), 1), len(units) - max(len(last), 1)
        costs = [sum(costs[:together]), *costs[together:after], sum(costs[after:])]
        cuts = [cut + together - 1 for cut in balanced_cuts(costs, number)]
    assignment = [units[start:end] for start, end in pairwise([0, *cuts, len(units)])]
    _refuse_shared_with_layers(model, assignment, job_config)
    return assignment


def balanced_cuts(costs: list[float], stages: int) -> list[int]:
    """Return where to cut a sequence into `stages` non-empty runs so that the largest sum is least.

    Returns:
        The first index of every run but the first. Among equals, earlier runs are shorter: the
        first stages of a pipeline hold the activations of the most micro-batches.
    """
    prefix = [0.0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)
    # best[k][n]: the least maximal sum of the first n costs in k + 1 runs, and the last cut.
    best = [[(prefix[n], 0) for n in range(len(costs) + 1)]]
    for runs in range(2, stages + 1):
        row = [(float("inf"), 0)] * (len(costs) + 1)
        for n in range(runs, len(costs) + 1):
            row[n] = min(
                (max(best[-1][cut][0], prefix[n] - prefix[cut]), cut) for cut in range(runs - 1, n)
            )
        best.append(row)
    cuts: list[int] = []
    end = len(costs)
    for row in reversed(best[1:]):
        end = row[end][1]
        cuts.insert(0, end)
    return cuts


def _costs(
    model: nn.Module, units: list[str], firsts: int, lasts: int, job_config: JobConfig
) -> list[float]:
    """Return each unit's cost: the parameters that a token uses, which are proportional to FLOPs.

    The embedding has no FLOPs, but takes memory. Its memory costs as much as a layer's memory does.
    """
    parallelism = job_config.parallelism
    sizes = [sum(p.numel() for p in parameters_of(model, name)) for name in units]
    costs = [_used_by_a_token(_unit(model, name)) for name in units]
    layers = slice(firsts, len(units) - lasts)
    cost_of_memory = sum(costs[layers]) / max(sum(sizes[layers]), 1)
    embedding_weight = parallelism.pipeline_parallel_embedding_weight * cost_of_memory
    weights = [embedding_weight] * firsts + [1.0] * (len(units) - firsts - lasts)
    weights += [parallelism.pipeline_parallel_output_weight] * lasts
    return [cost * weight for cost, weight in zip(costs, weights, strict=True)]


def parameters_of(model: nn.Module, name: str) -> list[nn.Parameter]:
    """Return the parameters of the module with this name, or the parameter with this name."""
    unit = _unit(model, name)
    return [unit] if isinstance(unit, nn.Parameter) else list(unit.parameters())


def _unit(model: nn.Module, name: str) -> nn.Module | nn.Parameter:
    return cast(nn.Module | nn.Parameter, attrgetter(name)(model))


def _used_by_a_token(unit: nn.Module | nn.Parameter) -> float:
    """Count parameters, each by the `token_share` of the modules around it.

    A module may state the share of the tokens that use its parameters, from 0 to 1.
    """
    if isinstance(unit, nn.Parameter):
        return unit.numel()
    own = sum(p.numel() for p in unit.parameters(recurse=False))
    return getattr(unit, "token_share", 1.0) * (own + sum(map(_used_by_a_token, unit.children())))


def _cuts_at(points: list[str], units: list[str], number: int, job_config: JobConfig) -> list[int]:
    key = "parallelism.pipeline_parallel_split_points"
    for point in points:
        if point not in units[1:]:
            fail(
                job_config, key, f"{point!r} is not a split point.{did_you_mean(point, units[1:])}"
            )
    if len(points) != number - 1:
        fail(
            job_config,
            key,
            f"{len(points)} points make {len(points) + 1} stages, but pipeline_parallel_degree x "
            f"stages per rank is {number}",
        )
    cuts = [units.index(point) for point in points]
    if cuts != sorted(set(cuts)):
        fail(job_config, key, "must be in the order of the model, without repetition")
    return cuts


def _refuse_other_parameters(model: nn.Module, units: list[str], job_config: JobConfig) -> None:
    """Refuse parameters that belong to no stage."""
    for name, _ in model.named_parameters(remove_duplicate=False):
        if not any(name == unit or name.startswith(f"{unit}.") for unit in units):
            fail(
                job_config,
                "parallelism.pipeline_parallel_degree",
                f"{type(model).__name__} has the parameter {name!r}, which is in no layer and not "
                "named in its pipeline_fn, so no stage would have it. Name it, or the module that "
                "has it: functools.partial(build_pipeline, first_modules=(...), "
                "last_modules=(...))",
            )


def _refuse_shared_with_layers(
    model: nn.Module, assignment: list[list[str]], job_config: JobConfig
) -> None:
    """Refuse a layer's weight that another stage has too; see `stage_copies` for other weights."""
    for weight in shared_weights(model, assignment):
        if not any(name.startswith("layers.") for name in weight.names):
            continue
        where = dict(zip(weight.stages, weight.names, strict=True))
        (one, name), (other, other_name) = list(where.items())[:2]
        fail(
            job_config,
            "parallelism.pipeline_parallel_degree",
            f"{name} and {other_name} are one weight, but in stages {one} and {other}. Of the "
            "weights of layers, stages cannot share any. Use a flavor without shared layers, or "
            "data and tensor parallelism",
        )


def _part(model: nn.Module, units: list[str], own: list[str]) -> nn.Module:
    others = [name for name in units if name not in own]
    # Not a bare parameter, which the stage's own modules may share.
    left_out = [unit for name in others if isinstance(unit := _unit(model, name), nn.Module)]
    kept = {id(_unit(model, name)) for name in own}  # one module may have two names
    part = copy.deepcopy(model, {id(unit): None for unit in left_out if id(unit) not in kept})
    for name in others:
        parent, _, child = name.rpartition(".")
        if parent:
            del layers_of(part)[child]
        else:
            setattr(part, name, None)
    return part
