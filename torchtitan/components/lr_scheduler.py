"""Schedule the learning rate over the run: warm-up, stable, decay."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from torchtitan.config import JobConfig
from torchtitan.config.lr_scheduler import LRScheduler
from torchtitan.errors import refuse_incomplete

_DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "sqrt": lambda progress: 1 - math.sqrt(progress),  # arXiv:2405.18392, section 3
}
"""Decay functions, from 1 at progress 0 to 0 at progress 1."""


def build_lr_scheduler(
    optimizers: Iterable[torch.optim.Optimizer], job_config: JobConfig
) -> LRSchedulersContainer:
    """Return the schedule of `[lr_scheduler]`, the same for all optimizers."""
    factor = schedule_of(job_config.lr_scheduler, job_config.training.steps)
    return LRSchedulersContainer(optimizers, factor)


def lr_schedulers_of(built: Any, job_config: JobConfig) -> LRSchedulersContainer:
    """Return what a `build_lr_scheduler_fn` has built, if the trainer can use it.

    Raises:
        ConfigError: it cannot use it, such as a scheduler of `torch.optim.lr_scheduler`.
    """
    wanted = ("last_lr", "step", "state_dict", "load_state_dict")
    missing = [name for name in wanted if not hasattr(built, name)]
    needed = ". Return torchtitan.components.lr_scheduler.LRSchedulersContainer(optimizers, factor)"
    needed += ", where factor(steps_done) multiplies the peak learning rates"
    refuse_incomplete(built, f"build_lr_scheduler_fn of {job_config.model.name}", missing, needed)
    return built


def schedule_of(config: LRScheduler, training_steps: int) -> Callable[[int], float]:
    """Return the learning rate over its peak, as a function of the optimizer steps done.

    The warm-up rises in equal increments from `1 / warmup_steps` in the first step to 1 in the last
    warm-up step. The decay, of at most the steps after the warm-up, reaches `min_lr_factor` only
    after the last step, so that no step runs with a learning rate of 0.
    """
    # All read now, or `warn_of_unread` would take those for unread that count later.
    steps, warmup_steps = config.total_steps or training_steps, config.warmup_steps
    decay, least = _DECAYS[config.decay_type], config.min_lr_factor
    decay_steps = max(steps - warmup_steps, 0)
    if config.decay_ratio is not None:
        decay_steps = min(round(config.decay_ratio * steps), decay_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        decayed = step - (steps - decay_steps)
        if decay_steps == 0 or decayed <= 0:
            return 1.0
        return least + (1 - least) * decay(min(decayed / decay_steps, 1.0))

    return factor


class LRSchedulersContainer:
    """Scales the learning rates that the optimizers were built with (their peaks) by one factor.

    Its state is the number of steps done, which does not depend on the layout. Peaks and shape come
    from the config, so that a run can resume with different ones.
    """

    def __init__(
        self, optimizers: Iterable[torch.optim.Optimizer], factor: Callable[[int], float]
    ) -> None:
        # By optimizer, not by group: an author's container may load as PyTorch does, which gives
        # an optimizer new groups.
        self._peaks = [(o, [group["lr"] for group in o.param_groups]) for o in optimizers]
        self._factor = factor
        self._set_step(0)

    @property
    def last_lr(self) -> float:
        """Highest learning rate of any group in the next step; 0 in a frozen pipeline stage."""
        rates = (group["lr"] for o, _ in self._peaks for group in o.param_groups)
        return max(rates, default=0.0)

    def step(self) -> None:
        """Advance the schedule; call after each optimizer step."""
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
