"""Import of modules that the configuration names."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from types import ModuleType

from torchtitan.errors import ConfigError


def import_user_module(name: str, key: str) -> ModuleType:
    """Import module `name`, which the user gave as the config's `key`.

    Modules in the working directory are found too, as under `python -m`.

    Raises:
        ConfigError: there is no such module, or importing it raised; names the error and its line.
    """
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        in_file = not frame.filename.startswith("<frozen")  # Python's own import code
        where = f" ({frame.filename}:{frame.lineno})" if in_file else ""
        raise ConfigError(
            f"{key} = {name!r}: the import failed with {type(error).__name__}: {error}{where}"
        ) from error
