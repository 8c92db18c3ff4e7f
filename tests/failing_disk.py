"""A folder whose disk fails, in this process: one call after the other, or all writes."""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = tuple[str, str]
"""Name of a function, and the path that it is given."""

_FUNCTIONS = ("stat", "lstat", "scandir", "listdir", "open", "mkdir", "rename", "replace")


class FailingDisk:
    """Notes the calls for paths below `folder`, and fails those that are asked for."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.calls: list[Call] = []
        self.failing: Call | None = None
        self.is_full = False
        for name in _FUNCTIONS:
            monkeypatch.setattr(os, name, self._watched(name, getattr(os, name)))
        opened = self._watched("file", io.open)
        monkeypatch.setattr(io, "open", opened)
        monkeypatch.setattr(builtins, "open", opened)
        for name in ("exists", "isfile", "isdir"):  # as of Python 3.14, the errors are lost
            method = {"isfile": "is_file", "isdir": "is_dir"}.get(name, name)
            monkeypatch.setattr(Path, method, getattr(os.path, name))

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(path: Any, *args: Any, **options: Any) -> Any:
            if isinstance(path, int) or not os.path.abspath(path).startswith(str(self.folder)):
                return function(path, *args, **options)
            call = name, os.path.abspath(path)
            if call == self.failing:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            self.calls.append(call)
            if self.is_full and name == "file" and set(args[0] if args else "r") & set("wax+"):
                return function("/dev/full", "r+b" if "b" in args[0] else "r+", *args[1:])
            return function(path, *args, **options)

        return watched
