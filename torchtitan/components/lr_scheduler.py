"""The learning rate over the run: warm-up, stable, decay."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from torchtitan.config import JobConfig
    from torchtitan.config.lr_scheduler import LRScheduler

DecayType = Literal["linear", "cosine", "sqrt"]

_DECAYS: dict[DecayType, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "sqrt": lambda progress: 1 - math.sqrt(progress),  # arXiv:2405.18392, section 3
}
"""From 1 at progress 0 to 0 at progress 1."""


def lr_factor(
    step: int,
    *,
    steps: int,
    warmup_steps: int = 0,
    decay_ratio: float | None = None,
    decay_type: DecayType = "linear",
    min_lr_factor: float = 0.0,
) -> float:
    """Learning rate as a factor of its peak, once `step` of `steps` optimizer steps are done.

    The warm-up goes in equal increments from `1 / warmup_steps` for the first step to 1 for the
    last of them. The decay reaches `min_lr_factor` when all steps are done, so that no step is
    spent on a learning rate of 0.

    Args:
        decay_ratio: share of the steps that decay; None, or more than the warm-up leaves, means all
            steps after the warm-up.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    after_warmup = max(steps - warmup_steps, 0)
    decay_steps = after_warmup
    if decay_ratio is not None:
        decay_steps = min(round(decay_ratio * steps), after_warmup)
    decayed = step - (steps - decay_steps)
    if decay_steps == 0 or decayed <= 0:
        return 1.0
    progress = min(decayed / decay_steps, 1.0)
    return min_lr_factor + (1 - min_lr_factor) * _DECAYS[decay_type](progress)


def build_lr_scheduler(
    optimizers: Iterable[torch.optim.Optimizer], job_config: JobConfig
) -> LRSchedulersContainer:
    """The schedule of `[lr_scheduler]`, for all optimizers alike."""
    factor = schedule_of(job_config.lr_scheduler, job_config.training.steps)
    return LRSchedulersContainer(optimizers, factor)


def schedule_of(config: LRScheduler, training_steps: int) -> Callable[[int], float]:
    """`lr_factor` of the steps done, as `[lr_scheduler]` says for a run of `training_steps`."""
    return partial(
        lr_factor,
        steps=config.total_steps or training_steps,
        warmup_steps=config.warmup_steps,
        decay_ratio=config.decay_ratio,
        decay_type=config.decay_type,
        min_lr_factor=config.min_lr_factor,
    )


class LRSchedulersContainer:
    """Scales the learning rates that the optimizers were built with, their peaks, by one factor.

    Its state is the number of steps done, whatever the layout. Peaks and shape are those of the
    config, so that a run can be resumed with other ones.
    """

    def __init__(
        self, optimizers: Iterable[torch.optim.Optimizer], factor: Callable[[int], float]
    ) -> None:
        # By optimizer and not by group, since loading a state gives an optimizer new group dicts.
        self._peaks = [(o, [group["lr"] for group in o.param_groups]) for o in optimizers]
        self._factor = factor
        self._set_step(0)

    @property
    def last_lr(self) -> float:
        """The learning rate of the next step, in the group where it is highest."""
        return max(group["lr"] for o, _ in self._peaks for group in o.param_groups)

    def step(self) -> None:
        """Call after each optimizer step."""
        self._set_step(self._step + 1)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._set_step(int(state_dict["step"]))

    def _set_step(self, step: int) -> None:
        self._step = step
        for optimizer, peaks in self._peaks:
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * self._factor(step)
