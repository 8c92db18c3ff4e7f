"""Warn about settings that are valid, but usually a mistake."""

from __future__ import annotations

import os
from typing import Any

from torchtitan.config.batch import batch_sizes
from torchtitan.config.job_config import JobConfig
from torchtitan.config.load import origin

_A_TRIAL = 50
"""Steps below which a run counts as a trial, which may well be all warm-up."""


def unlikely(job_config: JobConfig) -> list[str]:
    """Return a warning for each valid setting that is usually an oversight."""
    return [
        *_warmup_to_the_end(job_config),
        *_ramp_to_the_end(job_config),
        *_validation_of_other_data(job_config),
        *_validation_of_the_data_of_training(job_config),
    ]


def _warmup_to_the_end(job_config: JobConfig) -> list[str]:
    schedule, steps = job_config.lr_scheduler, job_config.training.steps
    span = schedule.total_steps or steps
    key = "lr_scheduler.total_steps" if schedule.total_steps else "training.steps"
    if schedule.warmup_steps < span or span < _A_TRIAL:
        return []
    return [
        f"{origin(job_config, 'lr_scheduler.warmup_steps')}: the warm-up takes up the whole "
        f"schedule ({key} = {span}), so the learning rate only rises. Set fewer"
    ]


def _ramp_to_the_end(job_config: JobConfig) -> list[str]:
    ramp = batch_sizes(job_config, 1).stages[:-1]
    steps = job_config.lr_scheduler.total_steps or job_config.training.steps
    if not ramp or ramp[-1][1] < steps or steps < _A_TRIAL:
        return []
    return [
        f"{origin(job_config, 'training.batch_size_ramp')}: it lasts to step {ramp[-1][1]}, but "
        f"the run has {steps}, so none has training.global_batch_size "
        f"({job_config.training.global_batch_size}) sequences. End it earlier"
    ]


def _validation_of_other_data(job_config: JobConfig) -> list[str]:
    validation, sources = job_config.validation, job_config.data.sources
    trained = [source.dataset for source in sources] or [job_config.training.dataset]
    default = type(validation)().dataset
    other = validation.sources or validation.dataset != default
    if not validation.enable or other or "stdlib" in trained:
        return []
    what = "data.sources" if sources else f"training.dataset = {trained[0]!r}"
    return [
        f"validation.dataset = {default!r}: validation reads Python's standard library, but "
        f"training reads {what}. Set validation.dataset and validation.dataset_path"
    ]


def _validation_of_the_data_of_training(job_config: JobConfig) -> list[str]:
    validation = job_config.validation
    if not validation.enable:
        return []
    training: list[Any] = [*job_config.data.sources] or [job_config.training]
    trained = [_data_of(config) for config in training]
    held_out: dict[str, Any] = {
        f"validation.sources.{i}.dataset": source for i, source in enumerate(validation.sources)
    }
    return [
        f"{key} = {config.dataset!r}: validation reads the training data (same dataset, path and "
        "split), so its loss is not measured on held-out data"
        for key, config in (held_out or {"validation.dataset": validation}).items()
        if _data_of(config) in trained
    ]


def _data_of(config: Any) -> tuple[str, str | None, str | None]:
    """Return the dataset, absolute path and split of a config section."""
    path = config.dataset_path
    return config.dataset, path and os.path.abspath(os.path.expanduser(path)), config.split
