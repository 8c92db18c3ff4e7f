"""What a run logged, step by step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torchtitan.errors import ConfigError

METRICS_FILE = "metrics.jsonl"

METRICS = ("loss", "grad_norm")
"""What is compared."""

Curve = dict[int, float]
"""Step -> value, NaN where it was not finite."""


def read_curves(folder: Path) -> dict[str, Curve]:
    """The curve of each of `METRICS`; empty ones if the run logged nothing."""
    rows = _read_rows(folder)
    return {
        name: {row["step"]: _number(row.get(name)) for row in rows if name in row}
        for name in METRICS
    }


def no_curves() -> dict[str, Curve]:
    """Those of a run that was not started."""
    return {name: {} for name in METRICS}


def read_world_size(folder: Path) -> int | None:
    """Number of processes of a finished run; None if its metrics do not tell."""
    for row in _read_rows(folder):
        whole, share = row.get("tokens_per_second"), row.get("tokens_per_second_per_device")
        if whole and share:
            return round(whole / share)
    return None


def read_tokens(folder: Path) -> tuple[int, int]:
    """A step of a finished run, and the tokens that it had seen after it.

    Raises:
        ConfigError: its metrics do not tell.
    """
    for row in _read_rows(folder):
        if row.get("tokens_seen"):
            return row["step"], row["tokens_seen"]
    raise ConfigError(
        f"{folder}: training.global_batch_size is -1, and {METRICS_FILE} has no tokens_seen to "
        "tell what it came to"
    )


def _read_rows(folder: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; a last line that was cut off is left out."""
    path = folder / METRICS_FILE
    if not path.is_file():
        return []
    rows = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            int(row["step"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise ConfigError(f"{path}:{number}: not a logged step: {line[:60]!r}") from error
        rows.append(row)
    return rows


def _number(value: float | None) -> float:
    """The run writes null for what is not finite."""
    return value if value is not None and math.isfinite(value) else math.nan
