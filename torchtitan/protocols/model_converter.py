"""`ModelConverter`: changes a model before it is parallelized, as `model.converters` lists."""

from __future__ import annotations

from typing import NoReturn, Protocol

import torch.nn as nn

from torchtitan.config import JobConfig, fail
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.errors import did_you_mean
from torchtitan.tools.text import few


class ModelConverter(Protocol):
    """Replaces modules of a model, such as linear layers by quantized ones.

    It may freeze parameters. It must keep their names, shapes and dtypes, so that checkpoints stay
    valid, unless its class sets `changes_parameters = True`, as one that adds adapters must.
    `generate`, `eval` and `convert to-hf` then apply it, too.

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
        self._job_config, names = job_config, job_config.model.converters
        for name in names:
            if name not in MODEL_CONVERTERS:
                self._fail(f"no such converter {name!r}.{did_you_mean(name, MODEL_CONVERTERS)}")
            if names.count(name) > 1:
                self._fail(f"{name!r} is given twice")
        self.converters = [MODEL_CONVERTERS[name](job_config, parallel_dims) for name in names]

    def _fail(self, problem: str) -> NoReturn:
        fail(self._job_config, "model.converters", problem)

    def convert(self, model: nn.Module) -> None:
        """Apply all converters.

        Raises:
            ConfigError: one changes parameters undeclared, or removes modules of an earlier one.
        """
        made: dict[nn.Module, tuple[str, str]] = {}  # module -> its name, and its converter's
        names = self._job_config.model.converters
        for converter_name, converter in zip(names, self.converters, strict=True):
            before, modules = _parameters_of(model), set(model.modules())
            converter.convert(model)
            here = {module: name for name, module in model.named_modules()}
            if undone := [names for module, names in made.items() if module not in here]:
                self._fail(
                    f"{converter_name!r} replaces {few([name for name, _ in undone], 5)}, which "
                    f"{undone[0][1]!r} has converted. List {converter_name!r} before it"
                )
            made |= {m: (name, converter_name) for m, name in here.items() if m not in modules}
            changed = before ^ _parameters_of(model)
            if changed and not _changes_parameters(converter):
                self._fail(
                    f"{type(converter).__name__} adds or changes parameters "
                    f"({few(sorted({name for name, _ in changed}))}). Its class must declare this "
                    "with changes_parameters = True"
                )

    def post_optimizer_hook(self, model_parts: list[nn.Module]) -> None:
        for converter in self.converters:
            converter.post_optimizer_hook(model_parts)


def _parameters_of(model: nn.Module) -> set[tuple[str, object]]:
    return {(name, (p.shape, p.dtype)) for name, p in model.named_parameters()}


def _changes_parameters(converter: ModelConverter | type[ModelConverter]) -> bool:
    return getattr(converter, "changes_parameters", False)


def convert_to_load(model: nn.Module, job_config: JobConfig, parallel_dims: ParallelDims) -> None:
    """Apply those converters of `job_config` that change parameters, so that weights fit the model.

    The modules that `job_config` imports must be loaded. Other converters are left out: they are
    for training, and may not fit this machine.
    """
    for name in job_config.model.converters:
        converter_cls = MODEL_CONVERTERS.get(name)
        if converter_cls is not None and _changes_parameters(converter_cls):
            converter_cls(job_config, parallel_dims).convert(model)


def build_model_converters(
    job_config: JobConfig, parallel_dims: ParallelDims
) -> ModelConvertersContainer:
    """Build the job's converters. Raise `ConfigError` for an unknown name or unfitting options."""
    import torchtitan.components.quantization  # noqa: F401  (registers ours)

    return ModelConvertersContainer(job_config, parallel_dims)
