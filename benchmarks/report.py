"""Formats samples, tables and a description of the machine as Markdown."""

from __future__ import annotations

import os
import platform
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from torchtitan.tools.text import three_digits


@dataclass(frozen=True)
class Spread:
    """Median and range of some samples."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        return cls(statistics.median(samples), min(samples), max(samples))

    @classmethod
    def of_ratios(cls, samples: Sequence[float], base: Sequence[float]) -> Spread:
        """Return the spread of `a / b` over the turns: each sample and that of the base."""
        return cls.of([a / b for a, b in zip(samples, base, strict=True)])

    def __str__(self) -> str:
        """`1.23 (1.20 to 1.31)`."""
        return (
            f"{three_digits(self.median)} ({three_digits(self.low)} to {three_digits(self.high)})"
        )


@dataclass(frozen=True)
class Bar:
    """A row's measurement, to be drawn."""

    name: str
    spread: Spread
    target: float | None = None


@dataclass
class Table:
    """A table of results."""

    title: str
    header: list[str]
    rows: list[list[str]] = field(default_factory=list)
    note: str = ""
    """What was compared, and how to read it; printed above the table."""
    bars: list[Bar] = field(default_factory=list)
    """The part of the table that is drawn, see plot.py."""
    bar_label: str = ""
    """Quantity of the bars, with the unit."""

    def markdown(self) -> str:
        lines = [f"## {self.title}", ""]
        if self.note:
            lines += [self.note, ""]
        for row in [self.header, ["---"] * len(self.header), *self.rows]:
            lines.append(f"| {' | '.join(row)} |")
        return "\n".join(lines) + "\n"


def verdict(value: float, *, at_least: float | None = None, at_most: float | None = None) -> str:
    """Format `>= 4: met`, or `>= 4: missed`."""
    if at_least is not None:
        sign, target, met = ">=", at_least, value >= at_least
    else:
        assert at_most is not None
        sign, target, met = "<=", at_most, value <= at_most
    return f"{sign} {target:g}: {'met' if met else 'missed'}"


def machine() -> str:
    """Describe the machine in one line: device, cores, threads, load and versions."""
    parts = []
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    load = os.getloadavg()[0]
    parts += [
        f"{os.cpu_count()} cores ({_cpu_model()})",
        f"{torch.get_num_threads()} PyTorch threads",
        f"load {load:.1f} at the end",
        f"Python {platform.python_version()}",
        f"torch {torch.__version__}",
    ]
    return ", ".join(parts)


def _cpu_model() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        match = None
    return match[1] if match else platform.machine()
