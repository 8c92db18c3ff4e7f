"""The learning rate over a run: linear warm-up, stable, decay."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import LambdaLR

if TYPE_CHECKING:
    from torchtitan.components.optimizer import OptimizersContainer
    from torchtitan.config import JobConfig

_DECAY = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "sqrt": lambda progress: 1 - math.sqrt(progress),
}
"""Share of the peak that is left when `progress` of the decay, 0 to 1, is over."""


def lr_factor(
    step: int,
    *,
    steps: int,
    warmup_steps: int,
    decay_ratio: float | None,
    decay_type: str,
    min_lr_factor: float,
) -> float:
    """Factor on the peak learning rate in step `step`, counted from 0.

    The warm-up's first step has `1 / warmup_steps`, its last has 1. The decay takes the last
    `decay_ratio * steps` steps, or as many as the warm-up leaves; None: all of those. It would
    reach `min_lr_factor` in the step after the last one.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    left = max(steps - warmup_steps, 0)
    decay_steps = left if decay_ratio is None else min(round(decay_ratio * steps), left)
    decayed = step - (steps - decay_steps)
    if decayed <= 0:
        return 1.0
    progress = min(decayed / decay_steps, 1.0) if decay_steps else 0.0
    return min_lr_factor + (1 - min_lr_factor) * _DECAY[decay_type](progress)


class LRSchedulersContainer:
    """One schedule for all optimizers; groups keep the ratios of their learning rates."""

    def __init__(self, schedulers: list[LambdaLR]) -> None:
        self._schedulers = schedulers

    def step(self) -> None:
        for scheduler in self._schedulers:
            scheduler.step()

    @property
    def last_lr(self) -> float:
        """The largest learning rate in use."""
        return max(lr for scheduler in self._schedulers for lr in scheduler.get_last_lr())

    def state_dict(self) -> dict[str, Any]:
        """The number of steps done, which is all there is to it on any layout."""
        return {"last_epoch": self._schedulers[0].last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for scheduler in self._schedulers:
            scheduler.last_epoch = int(state_dict["last_epoch"])
            # The peak and the schedule are the config's, also where a checkpoint says otherwise.
            lrs = scheduler.get_lr()
            for group, lr in zip(scheduler.optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr
            scheduler._last_lr = lrs


def build_lr_scheduler(
    optimizers: OptimizersContainer, job_config: JobConfig
) -> LRSchedulersContainer:
    """The schedule of `[lr_scheduler]` over `training.steps`."""
    config = job_config.lr_scheduler
    factor = partial(
        lr_factor,
        steps=job_config.training.steps,
        warmup_steps=config.warmup_steps,
        decay_ratio=config.decay_ratio,
        decay_type=config.decay_type,
        min_lr_factor=config.min_lr_factor,
    )
    return LRSchedulersContainer([LambdaLR(optimizer, factor) for optimizer in optimizers])
