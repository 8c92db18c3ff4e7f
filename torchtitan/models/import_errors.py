"""Keep one model's import error from breaking the others: raise it where the model is used."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from torchtitan.protocols.train_spec import BrokenModel
from torchtitan.tools.user_module import with_place


class _BrokenModule(ModuleType):
    """Takes the place of the package of a model whose import failed."""

    get_train_spec: BrokenModel

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # the import system asks for these
            raise AttributeError(name)
        self.get_train_spec(name)


def import_each(package: str, folder: Path) -> None:
    """Import the packages in the package of models, so that a failing one does not stop others.

    The `get_train_spec` of a failed package is a `BrokenModel`.
    """
    for found in pkgutil.iter_modules([str(folder)]):
        module = f"{package}.{found.name}"
        if not found.ispkg:
            continue
        try:
            importlib.import_module(module)
        except Exception as error:
            broken = sys.modules[module] = _BrokenModule(module)
            broken.__path__ = [str(folder / found.name)]  # so that its parts can be imported
            problem = with_place(error, [broken.__path__[0]])
            broken.get_train_spec = BrokenModel(found.name, problem, error)
