"""Judges two curves: a tolerance, and where they diverge."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Literal

from torchtitan.config import JobConfig
from torchtitan.tools.text import ranges

from .curves import METRICS, Curve
from .runs import Run

# Rounding differs between layouts, since sums are computed in another order, and training
# amplifies it. docs/converging.md has the measurements behind these numbers.
RTOL_FLOAT32 = {"loss": 1e-4, "grad_norm": 1e-2}
RTOL_BFLOAT16 = {"loss": 0.02, "grad_norm": 0.2}


def default_tolerances(configs: Iterable[JobConfig]) -> dict[str, float]:
    """Return the relative tolerance of each metric: wider if a run computes in bfloat16."""
    trainings = [config.training for config in configs]
    precisions = [(t.mixed_precision_param, t.mixed_precision_reduce) for t in trainings]
    return RTOL_BFLOAT16 if any("bfloat16" in each for each in precisions) else RTOL_FLOAT32


@dataclass
class Outcome:
    """A run that has ended."""

    run: Run
    curves: dict[str, Curve]
    failure: str | None = None
    """Exit code and end of the log of a failed job."""
    skipped: set[int] = field(default_factory=set)
    """Steps that the guard skipped; they have no loss."""

    def problems(self) -> list[str]:
        """Return the reasons why its curves cannot be compared completely."""
        problems = []
        steps = range(1, self.run.config.training.steps + 1)
        wanted = {*steps} - self.skipped
        missing = {name: wanted - curve.keys() for name, curve in self.curves.items()}
        if any(missing.values()):
            names = " and ".join(name for name in missing if missing[name])
            absent = step_ranges(set.union(*missing.values()))
            problems.append(f"no {names} of {absent} (of {len(steps)})")
        elif not wanted:
            problems.append(f"the guard skipped all {len(steps)} steps")
        for name, curve in self.curves.items():
            bad = {step for step, value in curve.items() if math.isnan(value)}
            if bad:
                problems.append(f"{name} is not finite at {step_ranges(bad)}")
        if self.failure:  # last, since it has many lines
            problems.append(self.failure)
        return problems


@dataclass
class Difference:
    """The difference of a test's curve from the control's."""

    tolerance: float
    relative: Curve
    """Step -> |test - control| / |control|; NaN if either is not finite."""

    @property
    def worst_step(self) -> int | None:
        """The step with the largest difference (NaN is the largest); None without a common step."""
        size = self.relative
        return max(size, key=lambda step: (math.isnan(size[step]), size[step]), default=None)

    @property
    def worst(self) -> float:
        return math.nan if self.worst_step is None else self.relative[self.worst_step]

    @property
    def final(self) -> float:
        return self.relative[max(self.relative)] if self.relative else math.nan

    @property
    def first_exceeding(self) -> int | None:
        """The first step beyond the tolerance."""
        beyond = (s for s, value in sorted(self.relative.items()) if not value <= self.tolerance)
        return next(beyond, None)


@dataclass
class Verdict:
    """The comparison of a test with the control."""

    outcome: Outcome
    differences: dict[str, Difference]
    problems: list[str] = field(default_factory=list)
    control_skipped: set[int] = field(default_factory=set)

    @property
    def name(self) -> str:
        return self.outcome.run.name

    @property
    def state(self) -> Literal["equal", "diverged", "failed"]:
        if self.problems:
            return "failed"
        if self.outcome.skipped != self.control_skipped:  # then it is another training
            return "diverged"
        exceeding = [d.first_exceeding for d in self.differences.values()]
        return "equal" if exceeding == [None] * len(exceeding) else "diverged"


def judge(
    control: Outcome, test: Outcome, rtol: float | None = None, grad_norm_rtol: float | None = None
) -> Verdict:
    """Compare a test with the control. None: `default_tolerances` of the two."""
    tolerances = dict(default_tolerances([control.run.config, test.run.config]))
    chosen = {"loss": rtol, "grad_norm": grad_norm_rtol}
    tolerances |= {name: value for name, value in chosen.items() if value is not None}
    differences = {
        name: Difference(tolerances[name], relative(control.curves[name], test.curves[name]))
        for name in METRICS
    }
    control_failed = ["the control failed"] if control.problems() else []
    problems = control_failed + test.problems()
    if not problems and not differences["loss"].relative:
        problems = ["the runs trained on no common step: the guard skipped the others"]
    return Verdict(test, differences, problems, control.skipped)


def relative(control: Curve, test: Curve) -> Curve:
    """Return the relative difference at each step that both have."""
    return {step: _relative(control[step], test[step]) for step in sorted({*control} & {*test})}


def _relative(control: float, test: float) -> float:
    if control == test:
        return 0.0
    return abs(test - control) / abs(control) if control else math.inf


def step_ranges(steps: Collection[int]) -> str:
    """Format `steps 3-7, 9`, with at most three ranges."""
    return f"step{'s' if len(steps) > 1 else ''} {ranges(steps)}"
