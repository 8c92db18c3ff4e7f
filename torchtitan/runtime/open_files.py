"""Raises the limit of open files, which includes sockets to other ranks and mapped shards."""

from __future__ import annotations

import resource
from contextlib import suppress

_MOST_ON_MACOS = 10_240
"""`OPEN_MAX`, the limit to set where macOS refuses an infinite one: setrlimit(2)."""


def allow_open_files() -> None:
    """Raise the limit of open files to this process's maximum.

    The usual limit, 1,024, is for programs that use `select`. With thousands of ranks, the store
    where they meet and a rank's groups need more sockets than that, and prepared data needs more
    files. Child processes inherit the raised limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return
    for limit in (hard, _MOST_ON_MACOS):
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            return
