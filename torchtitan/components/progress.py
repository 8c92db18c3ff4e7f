"""Show progress: a live bar on a terminal, or one line per logged step in a log."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import pairwise
from statistics import fmean
from typing import Any

from rich.cells import cell_len
from rich.console import Console, Group
from rich.control import Control
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import ControlType
from rich.table import Table
from rich.text import Text

from torchtitan.tools.logging import logger
from torchtitan.tools.text import duration, human, scientific, three_digits

# Wider lines are hard to follow.
_MAX_WIDTH = 100

_SPARKS = "▁▂▃▄▅▆▇█"
_LEAST_SPARKS = 8
_HISTORY = 256


def build_progress(kind: str, total_steps: int) -> PlainProgress:
    """Return the display for `metrics.progress`; `auto`: a bar if stderr is a terminal."""
    if kind == "auto":
        terminal = sys.stderr.isatty() and not Console(stderr=True).is_dumb_terminal
        kind = "bar" if terminal else "plain"
    if kind == "bar":
        return BarProgress(total_steps, Console(stderr=True, force_terminal=True))
    return PlainProgress(total_steps)


class PlainProgress:
    """Logs one line per logged step."""

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps

    def update(self, step: int, values: dict[str, Any], eta_seconds: float | None) -> None:
        """Show a step. `values` are those of `metrics.jsonl`."""
        width = len(str(self._total_steps))
        fields = [f"step {step:{width}}/{self._total_steps}", *_fields(values)]
        if eta_seconds is not None:
            fields.append(f"ETA {duration(eta_seconds)}")
        logger.info("%s", "  ".join(fields))

    def validation(self, loss: float) -> None:
        """Set the last loss on held-out data, which is in the log already."""

    def checkpoint(self, step: int) -> None:
        """Set the last complete checkpoint; the same one may be set repeatedly."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class BarProgress(PlainProgress):
    """Shows a few lines at the bottom of the terminal, with log lines scrolling above them.

    They are the progress bar, the values of the step, the loss history with the last checkpoint,
    and the last warning, if any. They are drawn when a step is logged, not by a thread, which would
    take time from training.
    """

    def __init__(self, total_steps: int, console: Console) -> None:
        super().__init__(total_steps)
        self._console = console
        self._live: Live | None = None
        self._drawn: list[int] = []
        """Widths of the lines now on the screen."""
        self._width = 0
        """Width of the terminal when they were drawn."""
        self._losses = History()
        self._warnings = WarningCounter()
        self._validation: float | None = None
        self._checkpoint: tuple[int, float] | None = None
        self._draw_last: Callable[[], None] = lambda: None

    def update(self, step: int, values: dict[str, Any], eta_seconds: float | None) -> None:
        self._losses.add(values["loss"])
        self._draw_last = partial(self._draw, step, values, eta_seconds)
        self._draw_last()

    def _draw(self, step: int, values: dict[str, Any], eta_seconds: float | None) -> None:
        if self._live is None:
            logger.addHandler(self._warnings)
        elif self._console.width < self._width:
            self._erase_wrapped()
        if self._live is None:
            self._live = Live(
                console=self._console,
                auto_refresh=False,
                redirect_stdout=sys.stdout.isatty(),  # output to a file stays in the file
            )
            self._live.start()
        width = min(self._console.width, _MAX_WIDTH)
        lines = [
            Text(_join_while_it_fits(_fields(values), width)),
            Text(self._history_line(width), style="dim"),
        ]
        if self._warnings.count:
            lines.append(Text(self._warnings.line(), style="yellow"))
        for line in lines:
            line.no_wrap = True
            line.truncate(width, overflow="ellipsis")
        lines = [line for line in lines if line.plain]
        self._live.update(Group(self._bar(step, eta_seconds, width), *lines), refresh=True)
        self._width = self._console.width
        self._drawn = [width, *(cell_len(line.plain) for line in lines)]

    def validation(self, loss: float) -> None:
        self._validation = loss

    def checkpoint(self, step: int) -> None:
        if self._checkpoint is None or self._checkpoint[0] != step:
            self._checkpoint = step, time.monotonic()

    def close(self) -> None:
        if self._live is not None:  # leave the final state on the screen
            with suppress(OSError):  # the terminal is closed
                self._draw_last()
        logger.removeHandler(self._warnings)
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _bar(self, step: int, eta_seconds: float | None, width: int) -> Table:
        bar = Table.grid(padding=(0, 1))
        bar.width = width
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        eta = "" if eta_seconds is None else f"  ETA {duration(eta_seconds)}"
        bar.add_row(
            f"step {step}/{self._total_steps}",
            ProgressBar(total=self._total_steps, completed=step, complete_style="cyan"),
            f"{step / self._total_steps:4.0%}{eta}",
        )
        return bar

    def _history_line(self, width: int) -> str:
        """Return `▇▅▄▃▂▂▁▁  validation 2.3456  checkpoint 500 (0:02:10 ago)`."""
        notes = []
        if self._checkpoint is not None:
            step, saved = self._checkpoint
            notes.append(f"checkpoint {step} ({duration(time.monotonic() - saved)} ago)")
        if self._validation is not None:
            notes.insert(0, f"validation {self._validation:.4f}")
        while notes and sum(map(len, notes)) + 2 * len(notes) + _LEAST_SPARKS > width:
            notes.pop(0)
        room = width - sum(2 + len(note) for note in notes)
        sparks = "" if self._console.options.ascii_only else self._losses.sparks(min(room, 40))
        return "  ".join(part for part in [sparks, *notes] if part)

    def _erase_wrapped(self) -> None:
        """Erase lines that a narrower terminal has wrapped; `rich` would leave parts of them."""
        if self._live is not None:
            self._live.stop()  # leaves the cursor below
        self._live = None
        rows = sum(-(-length // self._console.width) for length in self._drawn)
        self._console.control(Control.move(0, -rows), Control((ControlType.ERASE_IN_LINE, 2)))
        self._console.file.write("\x1b[J")  # to the end of the screen


class History:
    """Keeps the losses so far as enough averages to draw a chart of any width."""

    def __init__(self) -> None:
        self._values: list[float] = []
        self._each = 1
        """Losses averaged in each value, except the last, which is still being filled."""
        self._filled = 0

    def add(self, loss: float) -> None:
        if not math.isfinite(loss):
            return
        if self._filled in (0, self._each):
            if len(self._values) == 2 * _HISTORY:
                pairs = zip(self._values[::2], self._values[1::2], strict=True)
                self._values = [(a + b) / 2 for a, b in pairs]
                self._each *= 2
            self._values.append(loss)
            self._filled = 1
        else:
            self._filled += 1
            self._values[-1] += (loss - self._values[-1]) / self._filled

    def sparks(self, width: int) -> str:
        """Return at most `width` blocks, higher for larger losses; empty for fewer than two."""
        number = min(width, len(self._values))
        if number < 2:
            return ""
        edges = [len(self._values) * i // number for i in range(number + 1)]
        means = [fmean(self._values[a:b]) for a, b in pairwise(edges)]
        low, high = min(means), max(means)
        scale = (len(_SPARKS) - 1) / (high - low) if high > low else 0
        return "".join(_SPARKS[round((mean - low) * scale)] for mean in means)


class WarningCounter(logging.Handler):
    """Counts the warnings in the log and keeps the last."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0
        self._last = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1
        self._last = " ".join(record.getMessage().split())

    def line(self) -> str:
        """Return `warning: disk is full`, or `3 warnings, the last: disk is full`."""
        many = f"{self.count} warnings, the last" if self.count > 1 else "warning"
        return f"{many}: {self._last}"


def _fields(values: dict[str, Any]) -> list[str]:
    """Return the values in short form, the most important first, in at most 80 columns."""
    loss = values["loss"]
    plain = f"{loss:.{3 if loss >= 10 else 4}f}"
    fields = [
        f"loss {scientific(loss) if abs(loss) >= 1e6 else plain}",
        f"grad {three_digits(values['grad_norm'])}",
        f"lr {scientific(values['lr'], decimals=1)}",
        f"{human(values['tokens_per_second'], space='')} tok/s",
        f"{three_digits(values['tflops_per_second_per_device'])} TFLOP/s",
    ]
    if values.get("mfu") is not None:
        fields.append(f"MFU {values['mfu']:.0%}")
    fields.append(f"{three_digits(values['peak_memory_bytes'] / 2**30)} GiB")
    return fields


def _join_while_it_fits(fields: list[str], width: int) -> str:
    line = fields[0]
    for field in fields[1:]:
        if len(line) + 2 + len(field) > width:
            break
        line += "  " + field
    return line
