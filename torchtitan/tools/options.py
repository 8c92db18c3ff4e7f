"""What the sub-commands' options have in common."""

from __future__ import annotations

import argparse
from typing import Any

from torchtitan.errors import ConfigError


def shown_as(metavar: str, *aliases: str) -> Any:
    """An annotation for tyro: how the help shows an option's value, and other names of it."""
    import tyro

    return tyro.conf.arg(metavar=metavar, aliases=aliases)


def flag(name: str) -> str:
    """`batch_size` -> `--batch-size`."""
    return f"--{name.replace('_', '-')}"


def split_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """A command's own arguments, and those of the config behind `--`."""
    if "--" not in argv:
        return argv, []
    end = argv.index("--")
    return argv[:end], argv[end + 1 :]


def require_at_least_one(options: object, *names: str) -> None:
    """Raises `ConfigError` for a field that is set, and below 1."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"{flag(name)} {value}: must be at least 1")


def positive(text: str) -> int:
    """An argument's value, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number
