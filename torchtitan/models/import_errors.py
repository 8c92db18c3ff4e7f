"""Keeps one model's import error from breaking the others: it is raised where the model is used."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from torchtitan.errors import ConfigError
from torchtitan.tools.user_module import with_place


class BrokenModel:
    """In the registry, in place of a `get_train_spec`."""

    def __init__(self, name: str, problem: str, error: Exception) -> None:
        self.problem = f"the model {name} cannot be used: its import failed with {problem}"
        self._error = error

    def __call__(self, flavor: str) -> NoReturn:
        """Raises `ConfigError`, as a command that uses the model does."""
        raise ConfigError(self.problem) from self._error


class _BrokenModule(ModuleType):
    """What stands for the package of a model whose import failed."""

    get_train_spec: BrokenModel

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # what the import system asks for
            raise AttributeError(name)
        self.get_train_spec(name)


def import_each(package: str, folder: Path) -> None:
    """Import the packages in the package of models, so that one which fails stops no other.

    What then asks such a one for `get_train_spec` gets a `BrokenModel`.
    """
    for found in pkgutil.iter_modules([str(folder)]):
        module = f"{package}.{found.name}"
        if not found.ispkg:
            continue
        try:
            importlib.import_module(module)
        except Exception as error:
            broken = sys.modules[module] = _BrokenModule(module)
            broken.__path__ = [str(folder / found.name)]  # its parts can be imported
            problem = with_place(error, [broken.__path__[0]])
            broken.get_train_spec = BrokenModel(found.name, problem, error)
