"""Handles signals that stop a run: finish the step, save, and exit with a code for restarting."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType

from torchtitan.runtime.terminal import leave_closed_terminal

logger = logging.getLogger("torchtitan")

PREEMPTED = 75
"""Exit code of a run that a signal stopped before its last step: a restart resumes it.
A run that saves no checkpoints does not use it, since each restart would begin from step 0.

`EX_TEMPFAIL` of sysexits.h, and the code that schedulers' examples use. A run that has done its
last step ends with 0, whether a signal came or not.
"""


def stop_signals() -> list[signal.Signals]:
    """Return the signals that stop a run."""
    # Slurm announces the end of a job's time by `--signal=USR1@SECONDS`.
    signals = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # under `nohup` the run should go on
        signals.append(signal.SIGHUP)  # the terminal is closed
    return signals


class StopRequest:
    """Records signals until it is closed; only a second Ctrl-C interrupts as usual.

    Python delivers signals to the main thread only; in another thread, handlers are left unchanged.
    """

    def __init__(self) -> None:
        self.received = False
        self._interrupted = False
        in_main = threading.current_thread() is threading.main_thread()
        numbers = stop_signals() if in_main else []
        self._previous = {number: signal.signal(number, self._handle) for number in numbers}

    def close(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            leave_closed_terminal()
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        if not self.received:
            self.received = True
            name = signal.Signals(number).name
            again = ". Ctrl-C again stops at once" if self._interrupted else ""
            logger.warning(
                "%s: stopping after this step, with a checkpoint if they are enabled%s", name, again
            )
