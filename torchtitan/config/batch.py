"""Compute the batch of a step and how the ranks share it."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass
from typing import Literal

from torchtitan.errors import WorldSizeError
from torchtitan.tools.multiples import divisors, nearest_multiples

from .job_config import JobConfig
from .load import fail

UNSET_VALIDATION_BATCH = 8
"""Sequences in a validation step if `validation.local_batch_size` is unset. Training's batch size
depends on the layout; a fixed number validates all layouts on the same sequences."""


@dataclass(frozen=True)
class BatchSizes:
    """The sequences of each step: `training.global_batch_size`, or fewer during a ramp."""

    stages: tuple[tuple[int, int], ...]
    """`(sequences, last step)` of each size; the last one has no end."""
    one_pass: int
    """Sequences of one pass of all data ranks."""

    @classmethod
    def of(cls, global_batch_size: int, one_pass: int = 1) -> BatchSizes:
        """Return those of a run without a ramp."""
        return cls(((global_batch_size, sys.maxsize),), one_pass)

    def at(self, step: int) -> int:
        """Return the sequences of a step."""
        return next(size for size, last in self.stages if step <= last)

    def passes(self, step: int) -> int:
        """Return the forward passes of a rank in a step."""
        return self.at(step) // self.one_pass

    def through(self, step: int) -> int:
        """Return the sequences of all steps up to `step`."""
        total = before = 0
        for size, last in self.stages:
            total += size * max(min(step, last) - before, 0)
            before = last
        return total

    @property
    def largest(self) -> int:
        return self.stages[-1][0]

    @property
    def most_passes(self) -> int:
        """The forward passes of a rank in the largest step: more than 1 accumulate gradients."""
        return self.largest // self.one_pass

    @property
    def unit(self) -> int:
        """The largest number of sequences of which each step has a multiple."""
        return math.gcd(*(size for size, _ in self.stages))

    def units(self, step: int) -> int:
        """Return `through`, counted in units: without a ramp, the number of steps."""
        return self.through(step) // self.unit

    def __str__(self) -> str:
        """Return `512 (to step 2,000), 1,024 (to step 6,000), 2,048`."""
        ramp = [f"{size:,} (to step {last:,})" for size, last in self.stages[:-1]]
        return ", ".join([*ramp, f"{self.largest:,}"])


def batch_shape(
    job_config: JobConfig, section: Literal["training", "validation"]
) -> tuple[int, int]:
    """Return `(local_batch_size, seq_len)` of a forward pass; validation defaults to training's."""
    training, config = job_config.training, getattr(job_config, section)
    return (
        config.local_batch_size or training.local_batch_size,
        config.seq_len or training.seq_len,
    )


def batch_sizes(job_config: JobConfig, dp_world_size: int) -> BatchSizes:
    """Return the sequences of each step.

    Raises:
        ConfigError: `training.batch_size_ramp` is no ramp.
        WorldSizeError: a global batch size is no multiple of one pass of all data ranks.
    """
    training = job_config.training
    one_pass = training.local_batch_size * dp_world_size
    stages = (*_ramp(job_config), (training.global_batch_size, sys.maxsize))
    if training.global_batch_size == -1:
        return BatchSizes.of(one_pass, one_pass)
    for size, _ in reversed(stages):
        if size % one_pass:
            of_ramp = size < training.global_batch_size
            fail(
                job_config,
                "training.batch_size_ramp" if of_ramp else "training.global_batch_size",
                f"{f'{size} ' * of_ramp}must be a multiple of "
                f"training.local_batch_size ({training.local_batch_size}) x data "
                f"ranks ({dp_world_size}) = {one_pass}. "
                f"Nearest: {nearest_multiples(size, one_pass)}"
                f"{_fitting_data_ranks(size, training.local_batch_size)}",
                WorldSizeError,
            )
    return BatchSizes(stages, one_pass)


def divide_batch(job_config: JobConfig, groups: int) -> None:
    """Leave the batch of one of some replica groups in the config. Raises: see `batch_sizes`."""
    *ramp, (size, _) = batch_sizes(job_config, groups).stages
    job_config.training.global_batch_size = size // groups
    job_config.training.batch_size_ramp = [f"{size // groups}:{last}" for size, last in ramp]


def _ramp(job_config: JobConfig) -> list[tuple[int, int]]:
    """Return `(sequences, last step)` for each item of `training.batch_size_ramp`."""
    training, key, ramp = job_config.training, "training.batch_size_ramp", [(0, 0)]
    for item in training.batch_size_ramp:
        found = re.fullmatch(r"([1-9]\d{0,17}):([1-9]\d{0,17})", item, re.ASCII)
        if not found:
            problem = f"{item!r} is no batch size with its last step, such as '512:2000'"
            fail(job_config, key, problem)
        size, last = int(found[1]), int(found[2])
        if size <= ramp[-1][0] or last <= ramp[-1][1]:
            before = "{}:{}".format(*ramp[-1])
            fail(job_config, key, f"{item!r} must have a larger size and step than {before!r}")
        ramp.append((size, last))
    if 0 < training.global_batch_size <= ramp[-1][0]:
        problem = f"must be less than training.global_batch_size ({training.global_batch_size})"
        fail(job_config, key, f"{ramp[-1][0]} {problem}, the size after the ramp")
    if training.global_batch_size == -1 and ramp[1:]:
        fail(job_config, key, "needs training.global_batch_size, the size after the ramp")
    return ramp[1:]


def batches_to_skip(job_config: JobConfig) -> list[range]:
    """Return the ranges of batches that `training.skip_batches` names; the first batch is 1.

    Raises:
        ConfigError: an item is neither a number nor a range of them.
    """
    ranges = []
    for item in job_config.training.skip_batches:
        found = re.fullmatch(r"([1-9]\d{0,17})(?:-([1-9]\d{0,17}))?", item, re.ASCII)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last:
            problem = f"{item!r} is no batch such as '1300' and no range such as '1001-1250'"
            fail(job_config, "training.skip_batches", problem)
        ranges.append(range(first, last + 1))
    return ranges


def _fitting_data_ranks(global_batch_size: int, local_batch_size: int) -> str:
    """Return the end of a message: the numbers of data ranks that `global_batch_size` works on."""
    passes, rest = divmod(global_batch_size, local_batch_size)
    if rest:
        return ""
    fitting = [str(ranks) for ranks in divisors(passes)]
    shown = ", ".join(fitting[:8]) + (", ..." if len(fitting) > 8 else "")
    return f". Numbers of data ranks on which {global_batch_size} works: {shown}"
