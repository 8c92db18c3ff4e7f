"""Reads a run's logged values, step by step."""

from __future__ import annotations

import math
from itertools import compress
from pathlib import Path

from torchtitan.components.run_folder import METRICS_FILE, guard_skipped, read_rows
from torchtitan.errors import ConfigError

METRICS = ("loss", "grad_norm")
"""The metrics that are compared."""

Curve = dict[int, float]
"""Step -> value, NaN if it was not finite."""


def read_curves(folder: Path) -> dict[str, Curve]:
    """Return the curve of each of `METRICS`, without skipped steps; empty if nothing was logged."""
    rows = read_rows(folder / METRICS_FILE)
    return {
        name: {row["step"]: _number(row.get(name)) for row in rows if name in row}
        for name in METRICS
    }


def read_skipped(folder: Path) -> set[int]:
    """Return the steps whose batch the guard skipped."""
    rows = read_rows(folder / METRICS_FILE)
    skipped = guard_skipped(row.get("steps_skipped") or 0 for row in rows)
    return {row["step"] for row in compress(rows, skipped)}


def read_world_size(folder: Path) -> int | None:
    """Return the number of processes of a finished run; None if its metrics do not show it."""
    for row in read_rows(folder / METRICS_FILE):
        whole, share = row.get("tokens_per_second"), row.get("tokens_per_second_per_device")
        if whole and share:
            return round(whole / share)
    return None


def read_tokens(folder: Path) -> tuple[int, int]:
    """Return a number of steps of a finished run, and their tokens; skipped steps have none.

    Raises:
        ConfigError: the run's metrics do not show them.
    """
    step = seen = 0
    for row in read_rows(folder / METRICS_FILE):
        before, step = step, row["step"]
        if (row.get("tokens_seen") or 0) > seen:
            return step - before, row["tokens_seen"] - seen
    raise ConfigError(
        f"{folder}: training.global_batch_size is -1, and {METRICS_FILE} has no tokens_seen to "
        "derive it from"
    )


def _number(value: float | None) -> float:
    """Convert null, which the run writes for a value that is not finite, to NaN."""
    return value if value is not None and math.isfinite(value) else math.nan
