"""Import of modules that the configuration names."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType

from torchtitan.errors import ConfigError


class NoPackageError(ConfigError):
    """What should be a module is a folder without `__init__.py`."""


def import_user_module(name: str, key: str) -> ModuleType:
    """Import module `name`, which the user gave as the config's `key`.

    Modules in the working directory are found too, as under `python -m`.

    Raises:
        ConfigError: there is no such module, or importing it raised; names the error and its line.
        NoPackageError: Python finds a folder of that name and nothing to import in it.
    """
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(name)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        in_file = not frame.filename.startswith("<frozen")  # Python's own import code
        where = f" ({frame.filename}:{frame.lineno})" if in_file else ""
        raise ConfigError(
            f"{key} = {name!r}: the import failed with {type(error).__name__}: {error}{where}"
        ) from error
    if getattr(module, "__file__", None) is None and hasattr(module, "__path__"):
        raise NoPackageError(f"{key} = {name!r}: {_without_init(name, Path(*module.__path__[:1]))}")
    return module


def _without_init(name: str, folder: Path) -> str:
    """What is said of a folder that Python takes for a package, with nothing in it."""
    message = f"{folder} is a folder without __init__.py"
    if folder.joinpath(*name.split("."), "__init__.py").is_file():
        inside = os.path.relpath(folder)
        where = folder if inside.startswith("..") else inside
        return f"{message}. Run the command inside it: cd {where}"
    return f"{message}; nothing can be imported from it"
