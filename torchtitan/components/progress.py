"""The progress line: a live bar on a terminal, a line a logged step in a log."""

from __future__ import annotations

import logging
import sys
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from torchtitan.tools.text import duration, human, three_digits

logger = logging.getLogger("torchtitan")

# On wider terminals the eye loses the line.
_MAX_WIDTH = 100


class Progress(Protocol):
    """Shows how far a run is. `values` are those of `metrics.jsonl`; the ETA may be unknown."""

    def update(self, step: int, values: dict[str, Any], eta_seconds: float | None) -> None: ...

    def close(self) -> None: ...


def build_progress(kind: str, total_steps: int) -> Progress:
    """`kind` is `metrics.progress`; `auto` is the bar where stderr is a terminal."""
    if kind == "auto":
        terminal = sys.stderr.isatty() and not Console(stderr=True).is_dumb_terminal
        kind = "bar" if terminal else "plain"
    if kind == "bar":
        return BarProgress(total_steps, Console(stderr=True, force_terminal=True))
    return PlainProgress(total_steps)


class PlainProgress:
    """One line a logged step, through the log."""

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps

    def update(self, step: int, values: dict[str, Any], eta_seconds: float | None) -> None:
        width = len(str(self._total_steps))
        fields = [f"step {step:{width}}/{self._total_steps}", *_fields(values)]
        if eta_seconds is not None:
            fields.append(f"ETA {duration(eta_seconds)}")
        logger.info("%s", "  ".join(fields))

    def close(self) -> None:
        pass


class BarProgress:
    """Two lines that stay at the bottom of the terminal, with log lines scrolling above them.

    They are drawn when a step is logged, not by a thread, which would take time from training.
    """

    def __init__(self, total_steps: int, console: Console) -> None:
        self._total_steps = total_steps
        self._console = console
        self._live: Live | None = None

    def update(self, step: int, values: dict[str, Any], eta_seconds: float | None) -> None:
        if self._live is None:
            self._live = Live(
                console=self._console,
                auto_refresh=False,
                redirect_stdout=sys.stdout.isatty(),  # output to a file stays in the file
            )
            self._live.start()
        width = min(self._console.width, _MAX_WIDTH)
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
        line = Text(_join_while_it_fits(_fields(values), width), no_wrap=True)
        self._live.update(Group(bar, line), refresh=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def _fields(values: dict[str, Any]) -> list[str]:
    """The short forms of the values, the most important first; at most 80 columns together."""
    loss = values["loss"]
    mantissa, exponent = f"{values['lr']:.1e}".split("e")
    fields = [
        f"loss {loss:.{3 if loss >= 10 else 4}f}",
        f"grad {three_digits(values['grad_norm'])}",
        f"lr {mantissa}e{int(exponent)}",
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
