"""Hyperparameters as plain values: read from a job's `[model.args]`, and written for manifests."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torchtitan.config import JobConfig
from torchtitan.config.check import UNSET, BadValuesError, Path, fill, show
from torchtitan.config.load import origin
from torchtitan.errors import ConfigError, TitanError
from torchtitan.tools.user_module import places_of, with_place

A = TypeVar("A")
_PATH: Path = ("model", "args")


def plain_args(args: Any) -> dict[str, Any]:
    """Return a model's hyperparameters as JSON would load them; empty if `args` is no dataclass."""
    has_fields = dataclasses.is_dataclass(args) and not isinstance(args, type)
    plain = dataclasses.asdict(args) if has_fields else {}
    return json.loads(json.dumps(plain, default=str))


def changed_args(args: A, job_config: JobConfig) -> A:
    """Return a copy of a flavor's args with the values of the job's `model.args`.

    Raises:
        ConfigError: there is no such field, its type does not allow the value, or the class of the
            args refuses the values.
    """
    name = type(args).__name__
    try:
        with refusing(name, type(args).__module__):
            changed = fill(args, job_config.model.args, _PATH)
    except BadValuesError as error:
        lines = [f"{origin(job_config, m.path)}: {m.problem}" for m in error.mistakes]
        raise ConfigError("\n".join(lines)) from error
    refuse_replaced(changed, job_config, f"__post_init__ of {name}")
    return changed


def refuse_replaced(args: Any, job_config: JobConfig, by: str) -> None:
    """Raise `ConfigError` if `args` do not have the values of the job's `model.args`."""
    lines = [
        f"{origin(job_config, path)}: would be replaced: {by} sets it to {show(now)}"
        f"{_option_instead(path, now, job_config)}"
        for path, now in _replaced(job_config.model.args, plain_args(args), _PATH)
    ]
    if lines:
        raise ConfigError("\n".join(lines))


def _replaced(wanted: Any, now: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    if isinstance(wanted, dict) and isinstance(now, dict):
        for key, value in wanted.items():
            if key in now:  # not `class`
                yield from _replaced(value, now[key], (*path, key))
    elif isinstance(wanted, list) and isinstance(now, list) and len(wanted) == len(now):
        for i, value in enumerate(wanted):
            yield from _replaced(value, now[i], (*path, i))
    elif wanted != now and not (wanted in UNSET and now is None):
        yield path, now


def _option_instead(path: Path, now: Any, job_config: JobConfig) -> str:
    """Return a sentence on the option of the same name and value; "" if there is none."""
    for section in dataclasses.fields(job_config):
        options = vars(getattr(job_config, section.name))
        if path[-1] in options and options[str(path[-1])] == now:
            return f". Set {section.name}.{path[-1]} instead"
    return ""


@contextmanager
def refusing(name: str, module: str) -> Iterator[None]:
    """Raise `ConfigError` where code of the model fails, which changed args are the reason for.

    Args:
        name: of the class or function.
        module: in which it is.
    """
    try:
        yield
    except (TitanError, BadValuesError):
        raise
    except Exception as error:
        told = with_place(error, places_of(module))
        raise ConfigError(f"model.args: {name} fails with these values: {told}") from error
