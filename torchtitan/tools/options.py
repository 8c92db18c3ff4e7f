"""The common part of the sub-commands' options."""

from __future__ import annotations

from typing import Any

from torchtitan.errors import ConfigError, did_you_mean


def shown_as(metavar: str, *aliases: str) -> Any:
    """Return an annotation for tyro: the name of an option's value in the help, and its aliases.

    Aliases are written with dashes: tyro would not find them by underscores.
    """
    import tyro

    return tyro.conf.arg(metavar=metavar, aliases=aliases, help_behavior_hint=_default)


def _default(value: str) -> str:
    """Return the end of an option's help; that a default is empty says nothing."""
    return {"": "(repeatable)", "''": "", "None": ""}.get(value, f"(default: {value})")


def parse_action(actions: dict[str, Any], argv: list[str], prog: str, description: str) -> Any:
    """Parse the arguments of a command with actions: name -> dataclass, its docstring is the help.

    Raises:
        ConfigError: there is no such action.
        SystemExit: code 0 after printing help, 2 if an option is wrong.
    """
    import tyro

    name, *options = argv or [""]
    if name in actions:
        return tyro.cli(actions[name], args=options, prog=f"{prog} {name}")
    if name not in ("", "-h", "--help"):
        raise ConfigError(f"{prog}: unknown action {name!r}.{did_you_mean(name, actions)}")
    return tyro.extras.subcommand_cli_from_dict(
        actions, args=[name] if name else [], prog=prog, description=description
    )


def flag(name: str) -> str:
    """Return the flag of a field: `batch_size` -> `--batch-size`."""
    return f"--{name.replace('_', '-')}"


def split_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """Split a command's own arguments from the config's, which follow `--`.

    Raises:
        ConfigError: one of the config's is before it, as for `torchtitan train`.
    """
    end = argv.index("--") if "--" in argv else len(argv)
    for word in argv[:end]:
        name = word.partition("=")[0]
        if name.startswith("--") and "." in name:
            raise ConfigError(
                f"{name}: options of the config follow --, and its file needs no option: "
                "CONFIG.toml -- --training.steps 100"
            )
    return argv[:end], argv[end + 1 :]


def require_at_least_one(options: object, *names: str) -> None:
    """Raise `ConfigError` for a field that is set to less than 1."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"{flag(name)} {value}: must be at least 1")
