"""How many files a process may have open; sockets to other ranks and mapped shards count too."""

from __future__ import annotations

import resource
from contextlib import suppress


def allow_open_files() -> None:
    """Raise the limit of open files to the most that this process may have.

    The usual limit, 1,024, is for programs that use `select`. With thousands of ranks, the store in
    which they meet and a rank's groups have more sockets than that, and prepared data more files.
    Processes that are started from here have the raised limit too.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):  # macOS refuses a limit that is infinite
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
