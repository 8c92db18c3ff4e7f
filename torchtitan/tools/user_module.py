"""Imports modules that the configuration names."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType

from torchtitan.errors import ConfigError


class NoPackageError(ConfigError):
    """The name of a module belongs to a folder without `__init__.py`."""


def import_user_module(name: str, key: str) -> ModuleType:
    """Import module `name`, which the user gave as the config's `key`.

    Modules in the working directory are found too, as under `python -m`.

    Raises:
        ConfigError: there is no such module, or importing it raised; names the error and its line.
        NoPackageError: Python finds a folder of that name with nothing to import.
    """
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as error:
        problem = with_place(error, places_of(name)) + _where_to_look(name, error)
        raise ConfigError(f"{key} = {name!r}: the import failed with {problem}") from error
    if getattr(module, "__file__", None) is None and hasattr(module, "__path__"):
        raise NoPackageError(f"{key} = {name!r}: {_without_init(name, Path(*module.__path__[:1]))}")
    return module


def _where_to_look(name: str, error: BaseException) -> str:
    """Return a sentence for a name that is a file's, that Python does not find, or that upstream
    torchtitan may have; else "".
    """
    if os.sep in name or name.startswith(".") or name.endswith(".py"):
        return ". Give the name of a module as in Python's import, not the path of a file"
    if isinstance(error, ImportError) and (error.name or "").startswith("torchtitan."):
        return ". If upstream torchtitan has that name, see docs/migrating.md"
    if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
        return f". It is looked for in {os.getcwd()}, PYTHONPATH and the installed packages"
    return ""


def with_place(error: BaseException, places: list[str]) -> str:
    """Format `NameError: ... (FILE:LINE)`.

    Args:
        places: folders or files of the user. A line in them is preferred to one in a library that
            they call.
    """
    name = type(error).__name__
    if isinstance(error, SyntaxError) and error.filename:
        return f"{name}: {error.msg} ({error.filename}:{error.lineno})"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    own = [f for f in frames if any(Path(f.filename).is_relative_to(place) for place in places)]
    frame = (own or frames)[-1]
    in_file = not frame.filename.startswith("<frozen")  # Python's own import code
    return f"{name}: {error}" + (f" ({frame.filename}:{frame.lineno})" if in_file else "")


def places_of(name: str) -> list[str]:
    """Return where Python finds the module, or its package; empty if it does not find it."""
    try:
        spec = importlib.util.find_spec(name.partition(".")[0])
    except (ImportError, ValueError):
        return []
    if spec is None:
        return []
    return list(spec.submodule_search_locations or [spec.origin or ""])


def _without_init(name: str, folder: Path) -> str:
    """Format the message for a folder that Python takes for a package, with nothing in it."""
    message = f"{folder} is a folder without __init__.py"
    if folder.joinpath(*name.split("."), "__init__.py").is_file():
        inside = os.path.relpath(folder)
        where = folder if inside.startswith("..") else inside
        return f"{message}. Run the command inside it: cd {where}"
    return f"{message}; nothing can be imported from it"
