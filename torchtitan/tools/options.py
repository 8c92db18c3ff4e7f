"""The common part of the sub-commands' options."""

from __future__ import annotations

import argparse
from typing import Any

from torchtitan.errors import ConfigError


def shown_as(metavar: str, *aliases: str) -> Any:
    """Return an annotation for tyro: the name of an option's value in the help, and its aliases."""
    import tyro

    return tyro.conf.arg(metavar=metavar, aliases=aliases)


def flag(name: str) -> str:
    """Return the flag of a field: `batch_size` -> `--batch-size`."""
    return f"--{name.replace('_', '-')}"


def split_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """Split a command's own arguments from the config's, which follow `--`."""
    if "--" not in argv:
        return argv, []
    end = argv.index("--")
    return argv[:end], argv[end + 1 :]


def require_at_least_one(options: object, *names: str) -> None:
    """Raise `ConfigError` for a field that is set to less than 1."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"{flag(name)} {value}: must be at least 1")


def positive(text: str) -> int:
    """Parse an argument of argparse as a positive integer."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: must be at least 1")
    return number
