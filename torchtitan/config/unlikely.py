"""What a config may say, but hardly means."""

from __future__ import annotations

from .job_config import JobConfig
from .load import origin

_A_TRIAL = 50
"""Steps: a shorter run only tries something."""


def unlikely(job_config: JobConfig) -> list[str]:
    """A warning for each choice that is allowed, and that a run mostly gets by oversight."""
    return [*_warmup_to_the_end(job_config), *_validation_of_other_data(job_config)]


def _warmup_to_the_end(job_config: JobConfig) -> list[str]:
    schedule, steps = job_config.lr_scheduler, job_config.training.steps
    span = schedule.total_steps or steps
    key = "lr_scheduler.total_steps" if schedule.total_steps else "training.steps"
    if schedule.warmup_steps < span or span < _A_TRIAL:
        return []
    return [
        f"{origin(job_config, 'lr_scheduler.warmup_steps')}: the warm-up takes all of the "
        f"schedule, since {key} = {span}: the learning rate only rises. Set fewer"
    ]


def _validation_of_other_data(job_config: JobConfig) -> list[str]:
    validation, sources = job_config.validation, job_config.data.sources
    trained = [source.dataset for source in sources] or [job_config.training.dataset]
    default = type(validation)().dataset
    if not validation.enable or validation.dataset != default or "stdlib" in trained:
        return []
    what = "data.sources" if sources else f"training.dataset = {trained[0]!r}"
    return [
        f"validation.dataset = {default!r}: validation reads Python's standard library, but the "
        f"training has {what}. Set validation.dataset and validation.dataset_path"
    ]
