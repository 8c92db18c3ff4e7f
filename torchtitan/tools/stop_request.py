"""SIGTERM and SIGINT: finish the step, save, and exit cleanly."""

from __future__ import annotations

import logging
import signal
from types import FrameType

logger = logging.getLogger("torchtitan")

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """While open, the first signal is remembered; a second Ctrl-C interrupts as usual."""

    def __init__(self) -> None:
        self.received = False
        self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}

    def close(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True
        name = signal.Signals(number).name
        logger.warning("%s: stopping after this step, with a checkpoint if they are enabled", name)
