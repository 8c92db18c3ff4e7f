"""Extend `JobConfig` with the sections and fields of a user's module (`custom_config_module`)."""

from __future__ import annotations

import dataclasses
from copy import deepcopy
from functools import partial
from typing import Any, get_type_hints

from torchtitan.errors import ConfigError
from torchtitan.tools.user_module import import_user_module

from .check import BadValuesError, fill
from .job_config import JobConfig


def custom_job_config(module_name: str) -> JobConfig:
    """Return the default config, extended by the `JobConfig` dataclass of a user's module.

    That dataclass either subclasses ours or holds only the additions. New sections are added;
    existing sections get the user's additional fields.

    Raises:
        ConfigError: the module or its `JobConfig` is missing or does not fit.
    """
    option = "job.custom_config_module"
    theirs = getattr(import_user_module(module_name, option), "JobConfig", None)
    if not (isinstance(theirs, type) and dataclasses.is_dataclass(theirs)):
        raise ConfigError(f"{option} = {module_name!r}: the module has no dataclass JobConfig")
    try:
        config = _merge(theirs)()
        return fill(config, dataclasses.asdict(config))
    except BadValuesError as error:
        first = error.mistakes[0]
        problem = f"the default of {'.'.join(map(str, first.path))} {first.problem}"
        raise ConfigError(f"{option} = {module_name!r}: {problem}") from error
    except Exception as error:
        problem = f"its JobConfig cannot be used: {error}"
        raise ConfigError(f"{option} = {module_name!r}: {problem}") from error


def _merge(theirs: type) -> type[JobConfig]:
    default = theirs()
    ours, hints = get_type_hints(JobConfig), get_type_hints(theirs)
    sections: list[tuple[str, type, Any]] = []
    for field in dataclasses.fields(theirs):
        cls, value = hints[field.name], getattr(default, field.name)
        if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
            raise TypeError(f"{field.name} must be a dataclass, since it is a section")
        base = ours.get(field.name)
        if base and not issubclass(cls, base):
            cls = dataclasses.make_dataclass(cls.__name__, [], bases=(cls, base))
            value = cls(**vars(value))
        sections.append(
            (field.name, cls, dataclasses.field(default_factory=partial(deepcopy, value)))
        )
    bases = (theirs,) if issubclass(theirs, JobConfig) else (theirs, JobConfig)
    return dataclasses.make_dataclass("JobConfig", sections, bases=bases)
