"""Options of flux: `job.custom_config_module = "torchtitan.models.flux.config"`."""

from dataclasses import dataclass, field
from typing import Annotated

from torchtitan.config import JobConfig as TitanConfig
from torchtitan.config.base import NonNegative, Range


@dataclass
class Flux:
    text_dropout: Annotated[float, Range(ge=0, le=1)] = 0.447
    """Probability that training replaces the T5 states of a sample by zeros, and independently its
    CLIP vector, so that sampling can compare with an image of no text. Of 0.447, a fifth of the
    samples has neither."""
    guidance: Annotated[float, NonNegative] = 1.0
    """Guidance that a model with guidance (dev) is told in training: that of its own samples, since
    the training images are not guided."""


@dataclass
class JobConfig:
    flux: Flux = field(default_factory=Flux)


def flux_options(job_config: TitanConfig) -> Flux:
    """Return the section `[flux]`; its defaults if the job does not name this module."""
    return getattr(job_config, "flux", None) or Flux()
