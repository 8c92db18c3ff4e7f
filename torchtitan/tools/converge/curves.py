"""What a run logged, step by step."""

from __future__ import annotations

import math
from itertools import compress
from pathlib import Path

from torchtitan.errors import ConfigError
from torchtitan.tools.run_folder import METRICS_FILE, guard_skipped, read_rows

METRICS = ("loss", "grad_norm")
"""What is compared."""

Curve = dict[int, float]
"""Step -> value, NaN where it was not finite."""


def read_curves(folder: Path) -> dict[str, Curve]:
    """The curve of each of `METRICS`, without skipped steps; empty ones if nothing was logged."""
    rows = read_rows(folder / METRICS_FILE)
    return {
        name: {row["step"]: _number(row.get(name)) for row in rows if name in row}
        for name in METRICS
    }


def read_skipped(folder: Path) -> set[int]:
    """The steps whose batch the guard had the run leave out."""
    rows = read_rows(folder / METRICS_FILE)
    skipped = guard_skipped(row.get("steps_skipped") or 0 for row in rows)
    return {row["step"] for row in compress(rows, skipped)}


def no_curves() -> dict[str, Curve]:
    """The curves of a run that was not started."""
    return {name: {} for name in METRICS}


def read_world_size(folder: Path) -> int | None:
    """Number of processes of a finished run; None if its metrics do not tell."""
    for row in read_rows(folder / METRICS_FILE):
        whole, share = row.get("tokens_per_second"), row.get("tokens_per_second_per_device")
        if whole and share:
            return round(whole / share)
    return None


def read_tokens(folder: Path) -> tuple[int, int]:
    """So many steps of a finished run, and the tokens of them; none of skipped steps.

    Raises:
        ConfigError: its metrics do not tell.
    """
    step = seen = 0
    for row in read_rows(folder / METRICS_FILE):
        before, step = step, row["step"]
        if (row.get("tokens_seen") or 0) > seen:
            return step - before, row["tokens_seen"] - seen
    raise ConfigError(
        f"{folder}: training.global_batch_size is -1, and {METRICS_FILE} has no tokens_seen to "
        "tell what it came to"
    )


def _number(value: float | None) -> float:
    """The run writes null for what is not finite."""
    return value if value is not None and math.isfinite(value) else math.nan
