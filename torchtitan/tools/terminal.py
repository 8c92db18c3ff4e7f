"""A terminal that is closed while a run goes on, or is about to save."""

from __future__ import annotations

import os
import stat
from contextlib import suppress


def leave_closed_terminal() -> None:
    """Have what goes to stdout and stderr go nowhere, if that was a terminal which is closed now.

    Writing to it would fail, and end the run.
    """
    for descriptor in (1, 2):
        with suppress(OSError):
            device = stat.S_ISCHR(os.fstat(descriptor).st_mode)
            if device and not os.isatty(descriptor):  # a closed one says that it is none
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, descriptor)
                os.close(null)
