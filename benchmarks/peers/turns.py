"""How a trainer in a process of its own takes turns with others.

Imported by processes whose `torchtitan` is another package, so it imports nothing but the standard
library.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any, TextIO

WARMUP_STEPS = 3


class Turns:
    """A contestant's side. Call `before_step` before each optimizer step, `finish` at the end.

    It reports over one pipe and waits for the word to go on from another: after the warm-up, and
    after every turn.
    """

    def __init__(self, plan: dict[str, Any]) -> None:
        self._steps_per_turn = plan["steps_per_turn"]
        self._reports: TextIO = os.fdopen(plan["reports_fd"], "w")
        self._words: TextIO = os.fdopen(plan["words_fd"])
        self._steps_begun = 0
        self._resumed: tuple[float, float] | None = None
        self.losses: list[Any] = []
        """Of each micro-batch, its share of the step's loss: tensors, read at the end."""

    def before_step(self) -> None:
        done = self._steps_begun - WARMUP_STEPS
        self._steps_begun += 1
        if done == 1 - WARMUP_STEPS:
            self._report({"first_step": True})
        if done < 0 or done % self._steps_per_turn:
            return
        _wait_for_gpu()
        if self._resumed is not None:
            wall, cpu = time.perf_counter(), time.process_time()
            self._report({"wall": wall - self._resumed[0], "cpu": cpu - self._resumed[1]})
        if not self._words.readline():
            raise SystemExit("the comparison has ended")
        self._resumed = time.perf_counter(), time.process_time()

    def finish(self) -> None:
        self._report({"losses": [float(loss) for loss in self.losses], "peak": _peak_bytes()})

    def _report(self, values: dict[str, Any]) -> None:
        self._reports.write(json.dumps(values) + "\n")
        self._reports.flush()


def _cuda() -> Any:
    """`torch.cuda` if there is a GPU, else None."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def _wait_for_gpu() -> None:
    if cuda := _cuda():
        cuda.synchronize()


def _peak_bytes() -> int:
    """Of tensors on a GPU; else the kernel's high-water mark of the process's resident set."""
    if cuda := _cuda():
        return int(cuda.max_memory_allocated())
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match[1]) * 1024
