"""`ModelConverter` changes a model before it is parallelized: `model.converters` names some."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch.nn as nn

from torchtitan.config import JobConfig, fail
from torchtitan.errors import did_you_mean

if TYPE_CHECKING:
    from torchtitan.distributed.parallel_dims import ParallelDims


class ModelConverter(Protocol):
    """What replaces modules of a model, such as linear layers by quantized ones.

    Names, shapes and dtypes of parameters must stay, so that checkpoints do.

    Raises:
        ConfigError: the options do not fit the device or the layout.
    """

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims) -> None: ...

    def convert(self, model: nn.Module) -> None:
        """Change the whole model, which is on the meta device, in place."""

    def post_optimizer_hook(self, model_parts: list[nn.Module]) -> None:
        """Called after each optimizer step, with this rank's parts of the model."""


MODEL_CONVERTERS: dict[str, type[ModelConverter]] = {}
"""Name in `model.converters` -> class."""


def register_model_converter(converter_cls: type[ModelConverter], name: str) -> None:
    """Make a converter known. Repeating the same call is harmless.

    Raises:
        ValueError: the name is taken by another class.
    """
    known = MODEL_CONVERTERS.setdefault(name, converter_cls)
    if known is not converter_cls:
        raise ValueError(f"the converter {name!r} is already registered by {known.__module__}")


class ModelConvertersContainer:
    """The converters of `model.converters`, applied in that order, as one."""

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims) -> None:
        names = job_config.model.converters
        for name in names:
            if name not in MODEL_CONVERTERS:
                problem = f"no such converter {name!r}.{did_you_mean(name, MODEL_CONVERTERS)}"
                fail(job_config, "model.converters", problem)
            if names.count(name) > 1:
                problem = f"{name!r} is there twice"
                fail(job_config, "model.converters", problem)
        self.converters = [MODEL_CONVERTERS[name](job_config, parallel_dims) for name in names]

    def convert(self, model: nn.Module) -> None:
        for converter in self.converters:
            converter.convert(model)

    def post_optimizer_hook(self, model_parts: list[nn.Module]) -> None:
        for converter in self.converters:
            converter.post_optimizer_hook(model_parts)


def build_model_converters(
    job_config: JobConfig, parallel_dims: ParallelDims
) -> ModelConvertersContainer:
    """Raises `ConfigError` for an unknown name, or options that do not fit."""
    import torchtitan.components.quantization  # noqa: F401  (registers ours)

    return ModelConvertersContainer(job_config, parallel_dims)
