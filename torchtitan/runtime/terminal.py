"""Handles a terminal that is closed while a run goes on, or is about to save."""

from __future__ import annotations

import os
import stat
from contextlib import suppress


def leave_closed_terminal() -> None:
    """Redirect stdout and stderr to nowhere, if they were a terminal which is now closed.

    Otherwise writing to them would fail, and end the run.
    """
    for descriptor in (1, 2):
        with suppress(OSError):
            device = stat.S_ISCHR(os.fstat(descriptor).st_mode)
            if device and not os.isatty(descriptor):  # a closed terminal reports that it is none
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, descriptor)
                os.close(null)
