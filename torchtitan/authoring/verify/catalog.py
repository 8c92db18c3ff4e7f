"""Lists all checks, in the order in which they are run and shown."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module

from torchtitan.errors import ConfigError, did_you_mean

from .check import Check

MODULES = (
    "contract",
    "weights",
    "device",
    "loss_and_loader",
    "semantics",
    "invariances",
    "later_tokens",
    "numerics",
    "magnitudes",
    "cost",
    "adapter",
    "export",
    "hf_files",
    "hf_numbers",
    "learning",
    "slope",
    "stages",
    "layouts",
    "checkpoints",
)
"""Each has `CHECKS`."""


def all_checks() -> list[Check]:
    modules = (import_module(f".{name}", __package__) for name in MODULES)
    return [check for module in modules for check in module.CHECKS]


def choose(only: Iterable[str] = (), quick: bool = False) -> list[Check]:
    """Return the checks to run.

    Args:
        only: names of checks or groups; none: all. The checks they need are added.
        quick: leave out checks that are not `quick`, unless `only` names them.

    Raises:
        ConfigError: `only` contains an unknown name.
    """
    checks = {check.name: check for check in all_checks()}
    groups = {check.group for check in checks.values()}
    only = list(only)
    for name in only:
        if name not in checks and name not in groups:
            allowed = [*groups, *checks]
            raise ConfigError(f"--only {name}: no such check.{did_you_mean(name, allowed)}")
    if only:
        chosen = {n for n, check in checks.items() if n in only or check.group in only}
    else:
        chosen = {n for n, check in checks.items() if check.quick or not quick}
    missing = list(chosen)
    while missing:
        needed = set(checks[missing.pop()].needs) - chosen
        chosen |= needed
        missing += needed
    return [check for name, check in checks.items() if name in chosen]
