"""Shows the outcomes of checks: a table while they run, and JSON."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.text import Text

from .check import Check, Outcome

STYLES = {"pass": "green", "fail": "bold red", "skip": "yellow"}
_WIDTH = 110  # of a log file; a terminal has its own


def show(outcomes: Iterator[Outcome], checks: Sequence[Check], running: Running) -> list[Outcome]:
    """Print a line for each outcome as it comes, then the sums; return them in `checks`' order."""
    console = running.console
    width = max((len(check.name) for check in checks), default=0)
    done: dict[str, Outcome] = {}
    with running:
        for outcome in outcomes:
            done[outcome.check.name] = outcome
            running.finished(outcome.check)
            console.print(_line(outcome, width))
    counts = Counter(outcome.status for outcome in done.values())
    console.print(f"\n{counts['pass']} passed, {counts['fail']} failed, {counts['skip']} skipped")
    return [done[check.name] for check in checks]


def _line(outcome: Outcome, width: int) -> Text:
    text = Text()
    text.append(f"{outcome.status:4}  ", STYLES[outcome.status])
    text.append(f"{outcome.check.name:{width}}  ", "bold" if outcome.status == "fail" else "")
    text.append(f"{outcome.seconds:5.1f} s  ", "dim")
    text.append(outcome.message or outcome.check.asks)
    indent = "\n" + " " * 6
    if outcome.status == "fail":
        text.append(f"{indent}must hold: {outcome.check.asks}", "dim")
        if outcome.hint:
            text.append(f"{indent}look at: {outcome.hint}", "cyan")
    return text


class Running:
    """A line at the bottom of a terminal that names the running checks. Used from threads."""

    def __init__(self, total: int) -> None:
        terminal = sys.stdout.isatty()
        self.console = Console(
            width=None if terminal else _WIDTH, highlight=False, soft_wrap=not terminal
        )
        self._status = Status("", console=self.console)
        self._total, self._done = total, 0
        self._names: list[str] = []

    def started(self, check: Check) -> None:
        self._names.append(check.name)
        self._update()

    def finished(self, check: Check) -> None:
        self._done += 1
        if check.name in self._names:
            self._names.remove(check.name)
        self._update()

    def _update(self) -> None:
        self._status.update(f"{self._done}/{self._total}  {', '.join(self._names)}")

    def __enter__(self) -> Running:
        if self.console.is_terminal:
            self._status.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._status.stop()


def to_json(outcomes: Iterable[Outcome], model: str, flavor: str) -> dict[str, Any]:
    """Return the report as written by `--json`."""
    outcomes = list(outcomes)
    return {
        "model": model,
        "flavor": flavor,
        "passed": all(outcome.status != "fail" for outcome in outcomes),
        "checks": [
            {"name": outcome.check.name, "asks": outcome.check.asks}
            | {key: value for key, value in vars(outcome).items() if key != "check"}
            for outcome in outcomes
        ],
    }
